"""Rotary frequencies and angles against transformers' own, and the turn against megatron-core's."""

from __future__ import annotations

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from vlm_nemo.model.config import RopeScaling
from vlm_nemo.model.rope import angles, frequencies, table, turn


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_stretched_frequencies(kind: str) -> None:
    """Llama 3.1's own numbers: short waves stay, long ones are stretched whole, some lie between."""
    parameters = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0}
    scaling = RopeScaling(kind=kind, factor=8.0)
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        scaling = RopeScaling(kind=kind, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=parameters, max_position_embeddings=65536)
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    found = frequencies(128, 5e5, scaling)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    if kind == "llama3":
        stretch = frequencies(128, 5e5) / found
        assert stretch[0] == 1 and stretch[-1] == 8 and ((stretch > 1.1) & (stretch < 7.9)).any()


def test_sections_equal_qwen2_vl() -> None:
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            hidden_size=128,
            num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 10, 14]},
        )
    )
    positions = torch.randint(0, 5000, (3, 1, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = Qwen2VLRotaryEmbedding(config.text_config)(torch.zeros(1), positions)
    found = table(angles(positions, frequencies(64, 1e4), [8, 10, 14]), torch.float32)[:, :, 0].transpose(0, 1)
    for ours, theirs in zip(found.chunk(2, dim=-1), (cos, sin), strict=True):
        assert torch.allclose(torch.cat((ours, ours), dim=-1), theirs, atol=1e-6)


def test_three_equal_positions_are_ordinary_ones() -> None:
    positions = torch.tensor([0, 1, 2, 0, 1, 7]).expand(3, 1, -1)
    turns = frequencies(8, 1e4)
    assert torch.equal(angles(positions, turns, [1, 1, 2]), angles(positions, turns))
    assert torch.equal(angles(positions, turns)[5, 0, 0], 7 * turns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns_as_megatron_does(dtype: torch.dtype) -> None:
    """To the bit, gradients too; and the table is all that is kept for them."""
    positions = torch.tensor([0, 1, 2, 0, 1, 4000]).expand(3, 1, -1)
    turns = angles(positions, frequencies(16, 1e4))
    given = [torch.randn(6, 1, heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2)]
    slopes = [torch.randn_like(x) for x in given]
    by, kept = table(turns, dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = turn(*given, by)
    assert [t is by for t in kept] == [True]
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    both = torch.cat((turns, turns), dim=-1)
    expected = [apply_rotary_pos_emb(x, both, config, cp_group=object()) for x in given]
    ours, theirs = (torch.autograd.grad(out, given, slopes) for out in (found, expected))
    for one, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        assert torch.equal(one, other)


def test_numerical_gradient_of_a_turn() -> None:
    q, k = (torch.randn(4, 1, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    by = table(torch.rand(4, 1, 1, 4), torch.float64)
    assert torch.autograd.gradcheck(turn, (q, k, by))
