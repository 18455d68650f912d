"""The FLOP count against hand-made sums and the published shape of LLaVA-1.5 7B."""

from __future__ import annotations

import pytest

from tests import tiny
from vlm_nemo.model.config import ModelConfig, MoeConfig
from vlm_nemo.model.flops import step_flops

STAGE1 = {"vision": False, "projector": True, "language": False}
STAGE2 = {"vision": False, "projector": True, "language": True}
ALL = {"vision": True, "projector": True, "language": True}


def test_llava_7b_by_stage() -> None:
    """16.2 TFLOP an image of stage 1 (576 + 20 tokens), 35.2 a sample of stage 2 (576 + 301)."""
    stage1 = step_flops(ModelConfig(), STAGE1, lengths=[596], grids=[(24, 24)], supervised=20)
    stage2 = step_flops(ModelConfig(), STAGE2, lengths=[877], grids=[(24, 24)], supervised=301)
    assert stage1.total / 1e12 == pytest.approx(16.2, rel=0.01)
    assert stage2.total / 1e12 == pytest.approx(35.2, rel=0.01)
    assert stage1.vision / 1e9 == pytest.approx(366, rel=0.05)  # CLIP-L/336 up to its 23rd layer, forward only


def test_against_a_sum_by_hand() -> None:
    cfg = tiny.tiny_model()
    found = step_flops(cfg, ALL, lengths=[10, 6], grids=[(2, 2)], supervised=5)
    layer = 32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48
    assert found.language == 3 * (2 * 4 * layer * 16 + 2 * 4 * 32 * (10 * 10 + 6 * 6))
    assert found.head == 3 * 2 * 32 * 64 * 5
    vision_layer = 4 * 16 * 16 + 2 * 16 * 32
    assert found.vision == 3 * (2 * 2 * vision_layer * 5 + 4 * 2 * 16 * 5 * 5) + 2 * (2 * 192 * 16 * 4)
    assert found.projector == 2 * 4 * (16 * 32 * 3 + 32 * 32 * 3)


def test_only_the_experts_that_a_token_goes_to_count() -> None:
    """By hand: two of four experts, the shared one, its gate, and the router; the first layer is dense."""
    moe = MoeConfig(
        experts=4, top_k=2, ffn_hidden_size=24, shared_ffn_hidden_size=16, shared_gate=True, dense_layers=[0]
    )
    cfg = tiny.tiny_model(moe=moe)
    found = step_flops(cfg, ALL, lengths=[10, 6], grids=[(2, 2)], supervised=5)
    attention = 32 * 8 * (2 * 4 + 2 * 2)
    dense, sparse = 3 * 32 * 48, 3 * 32 * (2 * 24 + 16) + 32 * (4 + 1)
    matrices = 4 * attention + dense + 3 * sparse
    assert found.language == 3 * (2 * matrices * 16 + 2 * 4 * 32 * (10 * 10 + 6 * 6))


def test_frozen_parts_cost_less() -> None:
    cfg = ModelConfig()
    shape: dict = dict(lengths=[596], grids=[(24, 24)], supervised=20)
    assert step_flops(cfg, STAGE1, **shape).total < step_flops(cfg, STAGE2, **shape).total
    assert step_flops(cfg, STAGE2, **shape).vision * 3 > step_flops(cfg, ALL, **shape).vision
    nothing_upstream = {"vision": False, "projector": False, "language": False}
    assert step_flops(cfg, nothing_upstream, **shape).language * 2 < step_flops(cfg, STAGE1, **shape).language * 1.01
