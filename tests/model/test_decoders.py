"""Every kind of decoder against transformers' class with the same random weights, in one process."""

from __future__ import annotations

import pytest
import torch

from tests.model import decoders
from tests.model.decoders import KINDS
from vlm_nemo.runtime.config import ParallelConfig

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_transformers(name: str) -> None:
    """Each sample alone, then all in one padded row."""
    kind = KINDS[name]
    hf = kind.twin()
    (ours,) = decoders.build(kind, hf, ParallelConfig())
    samples = kind.with_logits(hf)
    for sample in samples:
        found = decoders.run([ours], decoders.row(kind, [sample], len(sample.tokens)), ParallelConfig())
        assert (found - sample.logits).abs().max() < 1e-4
    packed = decoders.run([ours], decoders.row(kind, samples, 256), ParallelConfig())
    expected = torch.cat([sample.logits for sample in samples])
    assert (packed[: len(expected)] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gemma3_images", "qwen2_vl", "mistral"])
def test_greedy_generation_equals_transformers(name: str) -> None:
    """Prompts with two, no and one image; windows are shorter than prompts; one prompt enters in pieces."""
    kind = KINDS[name]
    hf = kind.twin()
    (ours,) = decoders.build(kind, hf, ParallelConfig())
    samples = kind.samples(hf)
    ours.eval()
    found = decoders.greedy(ours, kind, samples, 20, chunk_tokens=60)
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    for sample, (said, logits) in zip(samples, found, strict=True):
        theirs = hf.generate(**sample.inputs, **options, output_logits=True, return_dict_in_generate=True)
        assert said == theirs.sequences[0, len(sample.tokens) :].tolist()
        assert (logits - torch.cat(theirs.logits)).abs().max() < 1e-4
