"""Every family beside transformers' class with the same random weights: logits, loss, alone, packed, TP2 and PP2."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.families.pairs import copy_weights, hf_inputs, hf_logits, sample, sizes_of
from tests.ranks import run_ranks
from tests.weights import zoo
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import IGNORE_INDEX

WITHIN = 1e-4


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        yield
        groups.stop()


def pair(name: str) -> tuple[ModelConfig, Tokenizer, Any]:
    """Configuration, tokenizer and transformers' random model; the same in every process."""
    cfg = zoo.config(name)
    words = zoo.write_words(Path(tempfile.mkdtemp()), cfg.family)
    return cfg, words, zoo.random_model(cfg, words)


def packed(cfg: ModelConfig, words: Tokenizer, samples: list[EncodedSample], padding: int = 0) -> ModelBatch:
    row = pack_batch(samples, sum(len(s.tokens) for s in samples) + padding, words.pad_id, cfg.vision.patch_size)
    return model_batch(row, cfg, image_token=words.image_id, device=device.device())


def expected(cfg: ModelConfig, words: Tokenizer, theirs: Any) -> tuple[list[EncodedSample], list[Tensor]]:
    """Conversations without, with one and with two images, and transformers' logits [T, V] of each."""
    sizes = sizes_of(cfg).values()
    samples = [sample(cfg, words, own) for own in sizes]
    logits = [hf_logits(theirs, cfg, s, own, words.image_id) for s, own in zip(samples, sizes, strict=True)]
    return samples, logits


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_logits_and_loss_are_transformers(name: str) -> None:
    cfg, words, theirs = pair(name)
    chunks = build_model(cfg, ParallelConfig(), "fp32", 0)
    copy_weights(theirs, chunks, cfg)
    ours = chunks[0].eval()
    samples, logits = expected(cfg, words, theirs)
    for one, wanted in zip(samples, logits, strict=True):
        assert (ours(packed(cfg, words, [one]), gather_logits=True)[0] - wanted).abs().max() < WITHIN
    row = packed(cfg, words, samples, padding=5)
    together = torch.cat(logits)
    assert (ours(row, gather_logits=True)[0, : len(together)] - together).abs().max() < WITHIN
    assert together.abs().max() > 1, "logits must be large to show anything"
    labels = torch.cat([torch.tensor([*s.labels[1:], IGNORE_INDEX]) for s in samples])
    loss = ours(row).sum() / row.loss_mask.sum()
    assert loss.item() == pytest.approx(F.cross_entropy(together, labels, ignore_index=IGNORE_INDEX).item(), abs=1e-5)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name != "blip2"])
def test_transformers_own_loss_is_ours(name: str) -> None:
    cfg, words, theirs = pair(name)
    chunks = build_model(cfg, ParallelConfig(), "fp32", 0)
    copy_weights(theirs, chunks, cfg)
    sizes = sizes_of(cfg)["one"]
    one = sample(cfg, words, sizes)
    row = packed(cfg, words, [one])
    loss = chunks[0].eval()(row).sum() / row.loss_mask.sum()
    given = hf_inputs(cfg, one, sizes, words.image_id)
    assert loss.item() == pytest.approx(theirs(**given, labels=torch.tensor([list(one.labels)])).loss.item(), abs=1e-5)


SPARSE = [name for name in zoo.MODELS if zoo.config(name).language.moe.experts]
LAYOUTS = [
    (ParallelConfig(tensor=2), list(zoo.MODELS)),
    (ParallelConfig(pipeline=2), list(zoo.MODELS)),
    (ParallelConfig(expert=2), SPARSE),
]


def differences() -> list[dict[str, float]]:
    """Largest difference of the packed row's logits from transformers', by layout and model; on two ranks."""
    found: list[dict[str, float]] = []
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        pairs = {name: pair(name) for name in zoo.MODELS}
        said = {name: expected(*made) for name, made in pairs.items()}
        for parallel, names in LAYOUTS:
            groups.lay_out(parallel, seed=0)
            found.append({})
            for name in names:
                (cfg, words, theirs), (samples, logits) = pairs[name], said[name]
                chunks = build_model(cfg, parallel, "fp32", 0)
                copy_weights(theirs, chunks, cfg)
                wanted = torch.cat(logits)
                out = forward(chunks[0].eval(), packed(cfg, words, samples, padding=5))
                if out is not None:
                    found[-1][name] = float((out[: len(wanted)] - wanted).abs().max())
        groups.stop()
    return found


def forward(chunk: Any, batch: ModelBatch) -> Tensor | None:
    """[T, V] on the last stage; hidden states go from stage to stage by hand."""
    from megatron.core import parallel_state
    from torch import distributed as dist

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return chunk(batch, gather_logits=True)[0]
    width = chunk.config.hidden_size
    length = batch.tokens.shape[1]
    if chunk.looks:  # the features travel behind the tokens
        assert batch.views is not None
        length += sum(1 + rows * columns for rows, columns in batch.views.grids)
    hidden = torch.empty(length, 1, width)
    if not chunk.pre_process:
        dist.recv(hidden, src=0)
        chunk.set_input_tensor([hidden])
    out = chunk(batch, gather_logits=chunk.post_process)
    if not chunk.post_process:
        dist.send(out.contiguous(), dst=1)
        return None
    return out[0]


def test_two_ranks_give_the_same() -> None:
    """Transformers' models are made once a rank, for all layouts."""
    first, second = run_ranks(differences, 2)
    for (parallel, names), one, other in zip(LAYOUTS, first, second, strict=True):
        assert set(one | other) == set(names), parallel
        assert set(one) == (set() if parallel.pipeline == 2 else set(names)), "the last stage alone has logits"
        assert max([*one.values(), *other.values()]) < WITHIN, (parallel, one, other)
