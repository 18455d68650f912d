"""Generation through the cache equals a whole forward a token, row by row, whatever shares the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import compositions, tiny
from tests.compositions import Composition
from tests.squares import squares
from vlm_nemo.data.packing import as_tensors
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.engine import Engine, Prompt
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.infer.torch_backend import TorchBackend
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.processes import run_ranks
from vlm_nemo.types import Images, UserError

PROMPTS = [(1, 9, 1), (2, 17, 2), (3, 5, 0), (4, 30, 1)]
"""seed, tokens, images"""


WORDS: Any = SimpleNamespace(
    vocab_size=64, image_id=compositions.IMAGE, eos_id=2, special_ids=frozenset(range(64)), decode=lambda ids: ""
)
"""A tokenizer that says nothing: ids are what counts here."""


@pytest.fixture
def chunk() -> Iterator[VLM]:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        (built,) = build_model(tiny.tiny_model(), ParallelConfig(), "fp32", seed=3)
        yield built.eval()
        groups.stop()


def backend_of(chunk: VLM, parallel: ParallelConfig | None = None, slots: int = 6) -> TorchBackend:
    ranks = groups.lay_out(parallel or ParallelConfig(), seed=0)
    return TorchBackend(chunk, tiny.tiny_model(), ranks, tiny.IMAGE, slots, 64)


def prompt(seed: int, length: int, images: int) -> tuple[list[int], Images[Any]]:
    tokens, _, pixels = tiny.sample(seed, length, images)
    found = squares(pixels.numpy(), tokens.tolist(), tiny.IMAGE)
    assert found is not None
    return tokens.tolist(), found


@torch.no_grad()
def without_cache(chunk: VLM, tokens: list[int], images: Images[Any]) -> NDArray[np.float32]:
    """The logits after the last token, by one training-like forward."""
    sample = (torch.tensor(tokens), torch.full((len(tokens),), -100), torch.zeros(0, 3, 16, 16).byte())
    row = replace(tiny.row([sample], len(tokens)), images=as_tensors(images))
    batch = model_batch(row, tiny.tiny_model(), image_token=tiny.IMAGE, device=device.device())
    return chunk(batch, gather_logits=True)[0, -1].numpy()


def continuation(seed: int, length: int) -> list[int]:
    return torch.randint(10, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_way_through_the_cache_gives_the_same_logits(chunk: VLM) -> None:
    backend = backend_of(chunk)
    texts = [prompt(*p) for p in PROMPTS]
    slots = [4, 1, 2, 0]
    # Prompts together
    found = backend.run([Row(slot=s, start=0, tokens=t, images=i) for s, (t, i) in zip(slots, texts, strict=True)])
    for logits, (tokens, images) in zip(found, texts, strict=True):
        np.testing.assert_allclose(logits, without_cache(chunk, tokens, images), atol=1e-5)
    # Single tokens of uneven rows, then several tokens at once, then a new prompt in an old slot beside the others
    said: list[list[int]] = [[] for _ in texts]
    for n in (1, 1, 3):
        rows = []
        for i, ((tokens, _), slot) in enumerate(zip(texts, slots, strict=True)):
            new = continuation(10 * i + len(said[i]), n if i != 1 else 1)
            rows.append(Row(slot=slot, start=len(tokens) + len(said[i]), tokens=new))
            said[i] += new
        for logits, (tokens, images), more in zip(backend.run(rows), texts, said, strict=True):
            np.testing.assert_allclose(logits, without_cache(chunk, tokens + more, images), atol=1e-5)
    fresh, picture = prompt(9, 7, 1)
    mixed = [
        Row(slot=4, start=len(texts[0][0]) + len(said[0]), tokens=[11]),
        Row(slot=1, start=0, tokens=fresh, images=picture),
        Row(slot=0, start=len(texts[3][0]) + len(said[3]), tokens=[12, 13]),
    ]
    first, second, third = backend.run(mixed)
    np.testing.assert_allclose(first, without_cache(chunk, [*texts[0][0], *said[0], 11], texts[0][1]), atol=1e-5)
    np.testing.assert_allclose(second, without_cache(chunk, fresh, picture), atol=1e-5)
    np.testing.assert_allclose(third, without_cache(chunk, [*texts[3][0], *said[3], 12, 13], texts[3][1]), atol=1e-5)


def test_row_mates_and_slots_change_no_bit_that_matters(chunk: VLM) -> None:
    texts = [prompt(*p) for p in PROMPTS]
    together = backend_of(chunk).run([Row(slot=i, start=0, tokens=t, images=p) for i, (t, p) in enumerate(texts)])
    alone = [backend_of(chunk).run([Row(slot=3, start=0, tokens=t, images=p)])[0] for t, p in texts]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    assert len({int(row.argmax()) for row in together}) > 1, "the rows must differ to show anything"


def test_counts_must_agree_in_every_row(chunk: VLM) -> None:
    """Two rows whose mistakes cancel are still two mistakes."""
    (tokens, images), (other, _) = prompt(1, 9, 1), prompt(3, 5, 0)
    rows = [Row(slot=0, start=0, tokens=tokens), Row(slot=1, start=0, tokens=other, images=images)]
    with pytest.raises(ValueError, match="the row has 4 image placeholders but 0 images of 0 embeddings"):
        backend_of(chunk).run(rows)


def test_the_cache_grows_with_what_it_holds(chunk: VLM) -> None:
    backend = backend_of(chunk)
    tokens, images = prompt(*PROMPTS[0])

    def held() -> set[tuple[int, ...]]:
        return {tuple(x.shape[:2]) for pair in backend._cache._layers.values() for x in pair}

    backend.run([Row(slot=0, start=0, tokens=tokens, images=images)])
    assert held() == {(1, len(tokens))}
    backend.run([Row(slot=0, start=len(tokens), tokens=[11])])
    assert held() == {(1, 2 * len(tokens))}
    backend.run([Row(slot=5, start=0, tokens=tokens, images=images)])
    (logits,) = backend.run([Row(slot=0, start=len(tokens) + 1, tokens=[12])])
    np.testing.assert_allclose(logits, without_cache(chunk, [*tokens, 11, 12], images), atol=1e-5)
    whole = backend_of(chunk)
    whole.reserve()
    assert {tuple(x.shape[:2]) for pair in whole._cache._layers.values() for x in pair} == {(6, 64)}


def test_a_cache_that_does_not_fit_says_what_to_lower(chunk: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend = backend_of(chunk)
    monkeypatch.setattr(torch.Tensor, "new_zeros", full)
    with pytest.raises(UserError, match="infer.slots=6 sequences of 64 tokens .* lower infer.slots or infer.context"):
        backend.reserve()


PLAIN = Composition(tower="siglip", reduction="none", projector="mlp", language="llama")
ZOO = {name: replace(PLAIN, language=name) for name in ("mistral", "qwen3", "gemma3")}
ZOO["qwen2_vl"] = replace(PLAIN, language="qwen2_vl", tower="qwen2_vit", reduction="merge", layout="native")


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_decoder_goes_on_from_its_prompt(name: str) -> None:
    """Windows, images that see themselves whole, and positions that go on behind an image's rows and columns: a prompt
    and three more tokens through the cache, against a whole forward that has no cache."""
    cfg = ZOO[name].config()
    (row,) = compositions.rows(cfg, 1, seed=5, capacity=120, images=[(2,)])
    length = row.used_tokens
    prompt = row.positions[:, :length]
    assert (prompt[0] != prompt[1]).any() == (name == "qwen2_vl") and row.images.count == 2
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        (built,) = build_model(cfg, ParallelConfig(), "fp32", seed=3)
        built.eval()
        backend = TorchBackend(built, cfg, groups.lay_out(ParallelConfig(), 0), compositions.IMAGE, 2, 120)
        images = arrays(row.images)
        asked = Prompt(
            tokens=row.tokens[:length].tolist(), images=lambda: images, image_count=2, positions=prompt.numpy()
        )
        params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=0)
        (answer,) = Engine(backend, WORDS).generate([asked], params)[0].outputs
        assert answer.error is None and answer.logprobs is not None
        for step, (token, said) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            more = torch.tensor(answer.token_ids[:step], dtype=torch.int64)
            positions = torch.cat((prompt, prompt.max() + 1 + torch.arange(step).expand(3, -1)), dim=1)
            whole = replace(
                row,
                tokens=torch.cat((row.tokens[:length], more)),
                labels=torch.full((length + step,), -100),
                positions=positions,
                cu_seqlens=torch.tensor([0, length + step], dtype=torch.int32),
                used_tokens=length + step,
            )
            batch = model_batch(whole, cfg, image_token=compositions.IMAGE, device=device.device())
            logits = built(batch, gather_logits=True)[0, -1]
            logits[compositions.IMAGE] = -torch.inf
            assert token == int(logits.argmax())
            assert said.logprob == pytest.approx(built_logprob(built, batch, token), abs=1e-4)
        groups.stop()


def arrays(images: Images[torch.Tensor]) -> Images[Any]:
    """As generation takes them."""
    found = {field.name: getattr(images, field.name) for field in fields(Images)}
    return Images(**{name: None if tensor is None else tensor.numpy() for name, tensor in found.items()})


def built_logprob(built: VLM, batch: ModelBatch, token: int) -> float:
    return float(built(batch, gather_logits=True)[0, -1].log_softmax(-1)[token])


def on_ranks(layout: dict[str, int]) -> list[list[float]]:
    """Prompts, then two more tokens each."""
    parallel = ParallelConfig(**layout)
    with device.adapter():
        groups.start(parallel, seed=0)
        (built,) = build_model(tiny.tiny_model(), parallel, "fp32", seed=3)
        backend = backend_of(built, parallel)
        texts = [prompt(*p) for p in PROMPTS]
        found = [backend.run([Row(slot=i, start=0, tokens=t, images=p) for i, (t, p) in enumerate(texts)])]
        for step in range(2):
            rows = [Row(slot=i, start=len(t) + step, tokens=[20 + i + step]) for i, (t, _) in enumerate(texts)]
            found.append(backend.run(rows))
        groups.stop()
    return np.concatenate(found).tolist()


def test_layouts_answer_alike_on_every_rank() -> None:
    (whole,) = run_ranks(on_ranks, 1, {})
    for layout in ({"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}):
        for rank in run_ranks(on_ranks, int(np.prod(list(layout.values()))), layout):
            np.testing.assert_allclose(rank, whole, atol=1e-4)
