"""LLaVA-NeXT's and LLaVA-OneVision's lines of tiles: what our sources pick is what their models pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.data.layout.test_pixels import PATCH, PINPOINTS, SIDE
from vlm_nemo.data.chat import TEMPLATES, encode_prompt
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.anyres import scaled_down, unpadded
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.plan import offset
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import Images, UserError

GRID = SIDE // PATCH
WIDTH = 3
SIZES = [(640, 480), (333, 517), (97, 101), (601, 37), (30, 450), (112, 112), (57, 56), (1000, 563)]


def packed(kind: str, features: torch.Tensor, size: tuple[int, int], pinpoints: list[list[int]]) -> torch.Tensor:
    """What transformers' model makes of the features [views, GRID * GRID, WIDTH] of an image."""
    import transformers

    config_class, model_class = {
        "next": (transformers.LlavaNextConfig, transformers.LlavaNextModel),
        "onevision": (transformers.LlavaOnevisionConfig, transformers.LlavaOnevisionModel),
    }[kind]
    tiny: dict[str, Any] = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    tower = "clip_vision_model" if kind == "next" else "siglip_vision_model"
    config = config_class(
        vision_config=dict(tiny, model_type=tower, image_size=SIDE, patch_size=PATCH),
        text_config=dict(tiny, model_type="llama", num_key_value_heads=1, vocab_size=16),
        image_grid_pinpoints=pinpoints,
    )
    newline = torch.full((WIDTH,), -1.0)
    sizes = torch.tensor([[size[1], size[0]]])
    extra = {"vision_feature_select_strategy": "default"} if kind == "next" else {"vision_aspect_ratio": "anyres_max_2"}
    found, _ = model_class(config).pack_image_features([features], sizes, image_newline=newline, **extra)
    return found[0]


def picked(features: NDArray[Any], sources: NDArray[Any], shares: NDArray[Any] | None) -> NDArray[Any]:
    """[M, WIDTH] by our sources; the newline is -1."""
    rows = np.concatenate([features.reshape(-1, WIDTH), np.full((1, WIDTH), -1.0, dtype=features.dtype)])
    return rows[sources] if shares is None else (rows[sources] * shares[..., None]).sum(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_lines_are_what_the_model_packs(kind: str, size: tuple[int, int]) -> None:
    layout = LayoutConfig(kind="anyres", pinpoints=PINPOINTS, max_unpadded=None if kind == "next" else 2)
    plan = plan_image(image_spec(layout, size=SIDE, patch=PATCH), size)
    features = torch.rand(len(plan.grids), GRID * GRID, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = packed(kind, features, size, PINPOINTS)
    sources, shares = plan.sources
    assert shares is None or kind == "onevision"
    assert np.abs(picked(features.numpy(), sources, shares) - expected.numpy()).max() < 1e-6


def test_some_images_are_scaled_down_and_some_are_not() -> None:
    spec = image_spec(LayoutConfig(kind="anyres", pinpoints=PINPOINTS, max_unpadded=2), size=SIDE, patch=PATCH)
    found = {plan_image(spec, size).sources[1] is None for size in SIZES}
    assert found == {True, False}


def test_by_hand() -> None:
    assert unpadded(48, 48, 500, 300) == (10, 38, 0, 48)
    assert unpadded(48, 48, 300, 500) == (0, 48, 10, 38)
    sources, shares = scaled_down(np.arange(16).reshape(4, 4), 2.0)
    assert sources[0, 0].tolist() == [0, 1, 4, 5] and shares[0, 0].tolist() == [0.25] * 4
    assert sources[1, 1].tolist() == [10, 11, 14, 15]


def test_one_with_shares_makes_all_have_them() -> None:
    lines = (np.array([[0, 1, 2, 3], [-1] * 4]), np.array([[0.25] * 4, [1, 0, 0, 0]], dtype=np.float32))
    sources, shares = offset([(np.array([0, -1]), None), lines], [2, 4])
    assert shares is not None and shares.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0.25] * 4, [1, 0, 0, 0]]
    assert sources.tolist() == [[0] * 4, [-1] * 4, [2, 3, 4, 5], [-1] * 4]


def test_a_row_of_images_with_and_without_shares(tokenizer: Tokenizer) -> None:
    layout = LayoutConfig(kind="anyres", pinpoints=PINPOINTS, max_unpadded=2)
    spec = image_spec(layout, size=SIDE, patch=PATCH)
    message: list[Message] = [{"role": "user", "content": "<image>"}]
    samples, plans = [], [plan_image(spec, (112, 30)), plan_image(spec, (640, 480))]
    for plan in plans:
        text = encode_prompt(message, tokenizer, TEMPLATES["plain"], [plan])
        images = Images(
            patches=np.zeros((plan.cost, 3 * PATCH**2), dtype=np.uint8),
            grids=np.array(plan.grids),
            views=np.array([len(plan.grids)]),
            embeddings=np.array([plan.embeddings]),
            slots=text.slots,
            sources=text.sources,
            shares=text.shares,
        )
        samples.append(EncodedSample(tokens=text.tokens, labels=text.tokens, images=images))
    row = pack_batch(samples, 512, pad_id=0, patch=PATCH)
    features = np.random.default_rng(0).random((sum(plan.embeddings for plan in plans), WIDTH)).astype(np.float32)
    assert row.images.shares is not None
    expected = [
        picked(part, *plan.sources) for part, plan in zip(np.split(features, [plans[0].embeddings]), plans, strict=True)
    ]
    found = picked(features, row.images.sources.numpy(), row.images.shares.numpy())
    assert np.abs(found - np.concatenate(expected)).max() < 1e-6


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (LayoutConfig(kind="anyres"), {}, "needs model.layout.pinpoints"),
        (LayoutConfig(kind="anyres", pinpoints=[[56, 57]]), {}, r"has \[56, 57\]"),
        (LayoutConfig(kind="anyres", pinpoints=PINPOINTS), {"class_token": True}, "line by line"),
        (LayoutConfig(kind="anyres", pinpoints=PINPOINTS), {"queries": 4}, "line by line"),
        (LayoutConfig(kind="tiles", min_tiles=3, max_tiles=2), {}, "min_tiles=3 and max_tiles=2"),
        (LayoutConfig(kind="rows"), {}, "needs model.layout.longest_edge, as 224"),
        (LayoutConfig(kind="native", min_pixels=10, max_pixels=5), {}, "min_pixels=10 and max_pixels=5"),
        (LayoutConfig(kind="spiral"), {}, "kind=spiral is unknown; choose one of square, anyres"),
    ],
)
def test_what_does_not_go_together_is_refused(layout: LayoutConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_image(image_spec(layout, size=SIDE, patch=PATCH, **changes), (640, 480))
