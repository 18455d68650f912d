"""A packed row is its samples side by side, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests import tiny
from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.views import vision_batch
from vlm_nemo.model.vlm import VLM
from vlm_nemo.types import PackedBatch

ToBatch = Callable[[PackedBatch], ModelBatch]
SAMPLES = [tiny.sample(1, 13), tiny.sample(2, 21, 2), tiny.sample(3, 7, 0), tiny.sample(4, 10)]
LENGTHS = [len(s[0]) for s in SAMPLES]
BOUNDS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]


@torch.no_grad()
def test_packed_logits_equal_separate_ones(model: VLM, to_batch: ToBatch) -> None:
    packed = model(to_batch(tiny.row(SAMPLES, 64)), gather_logits=True)[0]
    for i, sample in enumerate(SAMPLES):
        alone = model(to_batch(tiny.row([sample], LENGTHS[i])), gather_logits=True)[0]
        assert (packed[BOUNDS[i] : BOUNDS[i + 1]] - alone).abs().max() < 1e-6


@torch.no_grad()
def test_packed_loss_is_the_sum(model: VLM, to_batch: ToBatch) -> None:
    def loss(packed: PackedBatch) -> float:
        batch = to_batch(packed)
        return (model(batch) * batch.loss_mask).double().sum().item()

    separate = sum(loss(tiny.row([s], len(s[0]))) for s in SAMPLES)
    assert loss(tiny.row(SAMPLES, 64)) == pytest.approx(separate, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(len(SAMPLES)))
@pytest.mark.parametrize("what", ["tokens", "image"])
def test_a_changed_sample_moves_no_other(model: VLM, to_batch: ToBatch, changed: int, what: str) -> None:
    before = model(to_batch(tiny.row(SAMPLES, 64)), gather_logits=True)[0]
    tokens, labels, images = SAMPLES[changed]
    if what == "tokens":
        tokens = torch.where(tokens == tiny.IMAGE, tokens, (tokens - 3) % 50 + 4)
    elif len(images):
        images = 255 - images
    else:
        pytest.skip("the sample has no image")
    samples = [*SAMPLES[:changed], (tokens, labels, images), *SAMPLES[changed + 1 :]]
    after = model(to_batch(tiny.row(samples, 64)), gather_logits=True)[0]
    moved = (after - before).abs().amax(-1)
    inside = torch.zeros(64, dtype=torch.bool)
    inside[BOUNDS[changed] : BOUNDS[changed + 1]] = True
    assert moved[~inside].max() == 0
    assert moved[inside].max() > 1e-3


@torch.no_grad()
def test_language_is_causal(model: VLM, to_batch: ToBatch) -> None:
    packed = tiny.row([tiny.sample(5, 16, 0)], 16)
    tokens = packed.tokens.clone()
    tokens[9] = (tokens[9] - 3) % 50 + 4
    before = model(to_batch(packed), gather_logits=True)[0]
    after = model(to_batch(replace(packed, tokens=tokens)), gather_logits=True)[0]
    moved = (after - before).abs().amax(-1)
    assert moved[:9].max() == 0 and moved[9:].min() > 0


@torch.no_grad()
def test_vision_is_not_causal(model: VLM) -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    edited = image.clone()
    edited[:, :, 8:, 8:] = 255 - edited[:, :, 8:, 8:]  # the last of the four patches

    def features(pixels: torch.Tensor) -> torch.Tensor:
        found = tiny.images(torch.empty(0), pixels)
        return model.vision(vision_batch(found.patches, found.grids, tiny.tiny_model().vision))

    moved = (features(edited) - features(image)).abs().amax(-1)
    assert moved.min() > 1e-4, "the first patch must see the last"


def test_counts_must_agree(to_batch: ToBatch) -> None:
    packed = tiny.row(SAMPLES, 64)
    three = tiny.images(packed.tokens[: packed.images.slots[12]], torch.cat([s[2] for s in SAMPLES])[:3])
    with pytest.raises(ValueError, match="16 image placeholders but 3 images of 12 embeddings, which go to 12 of them"):
        to_batch(replace(packed, images=three))
    tokens = packed.tokens.clone()
    tokens[1] = 7
    with pytest.raises(ValueError, match="15 image placeholders but 4 images of 16 embeddings, which go to 15 of them"):
        to_batch(replace(packed, tokens=tokens))
    one_without = replace(packed.images, slots=packed.images.slots[4:], sources=packed.images.sources[4:])
    with pytest.raises(ValueError, match="16 image placeholders but 4 images of 16 embeddings, which go to 12 of them"):
        to_batch(replace(packed, images=one_without))
    with pytest.raises(ValueError, match="laid out for 18 embeddings, but the model gives 16"):
        more = packed.images.embeddings + torch.tensor([2, 0, 0, 0])
        to_batch(replace(packed, images=replace(packed.images, embeddings=more)))
    with pytest.raises(ValueError, match="image placeholders and no images"):
        to_batch(replace(packed, images=tiny.images(torch.empty(0), torch.empty(0, 3, 16, 16, dtype=torch.uint8))))


def test_a_text_only_row_gives_vision_zero_gradients(model: VLM, to_batch: ToBatch) -> None:
    """Not None: under data parallelism every rank must bring the same gradients to the same collectives."""
    batch = to_batch(tiny.row([tiny.sample(3, 20, 0)], 24))
    (model(batch) * batch.loss_mask).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith("language"):
            assert parameter.grad.abs().max() == 0, name
