"""Gemma's norms and embeddings in bf16, where the order of rounding shows."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding

from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.model.language import language_config, language_model
from vlm_nemo.model.norm import Norm
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig


def test_one_plus_weight_in_bf16() -> None:
    config = SimpleNamespace(
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        sequence_parallel=False,
        layernorm_zero_centered_gamma=True,
    )
    ours, theirs = Norm(config, 64, 1e-6), Gemma3RMSNorm(64, 1e-6).bfloat16()  # type: ignore[arg-type]
    with torch.no_grad():
        theirs.weight.normal_(0, 1e-3)
        ours.weight.copy_(theirs.weight)
    x = torch.randn(500, 64, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x))


def test_scaled_embeddings_in_bf16() -> None:
    """Their scale is rounded before it multiplies: sqrt(2560) is 50.5."""
    cfg = LanguageConfig(
        vocab_size=32, hidden_size=2560, num_layers=1, num_heads=8, num_kv_heads=8, ffn_hidden_size=8,
        embedding_scale=2560**0.5,
    )  # fmt: skip
    theirs = Gemma3TextScaledWordEmbedding(32, 2560, 0, 2560**0.5)
    theirs.weight.data = theirs.weight.data.bfloat16()
    tokens = torch.arange(32)[None]
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        config = language_config(cfg, ParallelConfig(), torch.bfloat16, {})
        ours = language_model(cfg, config, first=True, last=True, vp_stage=None)
        ours.embedding.word_embeddings.weight.copy_(theirs.weight)
        assert torch.equal(ours.embed(tokens, tokens.expand(3, 1, -1))[:, 0], theirs(tokens)[0])
        groups.stop()
