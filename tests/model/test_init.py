"""Fresh weights: a function of seed and name, cut from the whole tensor, with the spreads that the options name."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from vlm_nemo.model.boxes import Box
from vlm_nemo.model.init import initial_value

SHAPE = (200, 160)


def value(key: str, cfg: object = None, box: tuple[int, int] = SHAPE, offset: tuple[int, int] = (0, 0)) -> torch.Tensor:
    return initial_value(Box(key=key, global_shape=SHAPE, offset=offset, shape=box), cfg or tiny_model(), 7)  # type: ignore[arg-type]


def test_spreads() -> None:
    cfg = tiny_model()
    assert value("vision.position", cfg).std() == pytest.approx(0.1, rel=0.02), "null follows init_std"
    cfg.vision.position_init_std = 0.7
    assert value("vision.position", cfg).std() == pytest.approx(0.7, rel=0.02)
    assert value("vision.patch_weight", cfg).std() == pytest.approx(0.1, rel=0.02)
    inner = value("language.decoder.layers.0.mlp.linear_fc2.weight", cfg)
    assert inner.std() == pytest.approx(0.1 / 8**0.5, rel=0.02), "what writes into the stream: by 1/sqrt(2 layers)"


def test_a_piece_is_cut_from_the_whole() -> None:
    whole = value("vision.patch_weight")
    assert torch.equal(value("vision.patch_weight", box=(50, 80), offset=(100, 80)), whole[100:150, 80:])
    assert not torch.equal(whole, value("vision.position"))


def test_a_norm_that_adds_one_starts_at_zero() -> None:
    cfg = tiny_model()
    key = "language.decoder.layers.0.self_attention.q_layernorm.weight"
    assert (value(key, cfg) == 1).all()
    cfg.language.norm_plus_one = True
    assert (value(key, cfg) == 0).all()
    assert (value("vision.pre_norm.weight", cfg) == 1).all(), "of the language model only"
