"""Fields of megatron-core's config that a recipe may set: known, not decided elsewhere, and not idle."""

from __future__ import annotations

import pytest
import torch

from vlm_nemo.model.transformer import transformer_config
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qk_layernrom", "is not a field of megatron-core's"),
        ("hidden_dropout", "is decided by another key"),
        ("no_rope_freq", "changes megatron-core's own attention, which is not used here"),
        ("rotary_interleaved", "changes megatron-core's own attention, which is not used here"),
    ],
)
def test_fields_that_are_refused(name: str, message: str) -> None:
    sizes = dict(num_layers=1, hidden_size=4, num_attention_heads=1)
    with pytest.raises(UserError, match=f"model.megatron.{name} {message}"):
        transformer_config(ParallelConfig(), torch.float32, pipelined=True, extra={name: 1}, **sizes)
    given = transformer_config(ParallelConfig(), torch.float32, pipelined=True, extra={"qk_layernorm": True}, **sizes)
    assert given.qk_layernorm
