"""The language graph: embeddings in, logits of one place a sequence out, the cache updated in place.

    inputs_embeds [B, S, D]   position_ids [B, S]   write_indices [B]   last_index [B]   past_key_i, past_value_i
        -> logits [B, V] fp32, present_key_i, present_value_i [B, kv_heads, capacity, d]

The same graph prefills (S = the prompt) and decodes (S = 1). Row b's keys and values are written from
write_indices[b] on; a token sees the cache up to its own position, through an explicit mask. The logits are those
behind row b's token last_index[b]: prompts of uneven length are padded on the right, and what padding wrote into the
cache is overwritten before a mask ever shows it. TensorRT takes exactly this form (gate.py names what it does not).
Rotary angles are fp32 in every precision: at position 4096 bf16 could not tell neighbours apart.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from vlm_nemo.export.graph import Dim, Graph
from vlm_nemo.export.tensors import TensorFile
from vlm_nemo.model.config import LanguageConfig, ModelConfig

MODEL = "language_model.model."
EMBEDDING = MODEL + "embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def language_graph(cfg: ModelConfig, data: TensorFile, capacity: int) -> Graph:
    """The graph of a model's decoder; its weights are reserved in `data`. capacity: tokens of one sequence."""
    g = Graph("llm", data)
    lang = cfg.language
    width, head = lang.hidden_size, lang.hidden_size // lang.num_heads
    x = g.input("inputs_embeds", g.type, ["B", "S", width])
    positions = g.input("position_ids", TensorProto.INT64, ["B", "S"])
    write = g.input("write_indices", TensorProto.INT64, ["B"])
    last = g.input("last_index", TensorProto.INT64, ["B"])
    cache: list[Dim] = ["B", lang.num_kv_heads, capacity, head]

    places = g.table("cache_positions", np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, capacity))
    seen_from = g.node("Unsqueeze", positions, g.ints(1, 3))
    mask = g.node("LessOrEqual", places, seen_from)  # [B, 1, S, capacity]
    cos, sin = (
        g.node("Unsqueeze", g.node("Gather", g.table(name, table), positions, axis=0), g.ints(1))
        for name, table in zip(("rope_cos", "rope_sin"), rope_tables(lang, capacity), strict=True)
    )
    for i in range(lang.num_layers):
        past = [g.input(f"past_{kind}_{i}", g.type, cache) for kind in ("key", "value")]
        x = _layer(g, lang, i, x, past, mask, (cos, sin), write)
        for kind in ("key", "value"):
            g.output(f"present_{kind}_{i}", g.type, cache)

    x = _norm(g, lang, x, MODEL + "norm.weight")
    x = g.node("GatherND", x, g.node("Unsqueeze", last, g.ints(1)), batch_dims=1)
    head_weight = g.weight(EMBEDDING if lang.tied_embeddings else HEAD, (lang.vocab_size, width), transposed=True)
    logits = g.node("MatMul", x, head_weight)
    g.cast(logits, TensorProto.FLOAT, name="logits")
    g.output("logits", TensorProto.FLOAT, ["B", lang.vocab_size])
    return g


def rope_tables(lang: LanguageConfig, capacity: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of every position's angles, each [capacity, d / 2].

    By torch, with the formula of the training's own model: a frequency that differs in its last bit turns position
    4096 by 2e-4.
    """
    head = lang.hidden_size // lang.num_heads
    frequencies = 1.0 / (lang.rope_base ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    angles = torch.outer(torch.arange(capacity, dtype=torch.float32), frequencies)
    return angles.cos().numpy(), angles.sin().numpy()


def _layer(
    g: Graph, lang: LanguageConfig, i: int, x: str, past: list[str], mask: str, rope: tuple[str, str], write: str
) -> str:
    names = f"{MODEL}layers.{i}."
    head = lang.hidden_size // lang.num_heads
    kv_width = head * lang.num_kv_heads
    y = _norm(g, lang, x, names + "input_layernorm.weight")
    q = _heads(g, _linear(g, y, names + "self_attn.q_proj", lang.hidden_size, lang.hidden_size), lang.num_heads, head)
    k, v = (
        _heads(g, _linear(g, y, f"{names}self_attn.{p}_proj", lang.hidden_size, kv_width), lang.num_kv_heads, head)
        for p in "kv"
    )
    q, k = _rotate(g, q, rope), _rotate(g, k, rope)
    present = [
        g.node("TensorScatter", old, new, write, to=f"present_{kind}_{i}", axis=2, mode="linear")
        for kind, old, new in zip(("key", "value"), past, (k, v), strict=True)
    ]
    y = g.node("Attention", q, *present, mask)
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, 0, lang.hidden_size))
    x = g.node("Add", x, _linear(g, y, names + "self_attn.o_proj", lang.hidden_size, lang.hidden_size))
    y = _norm(g, lang, x, names + "post_attention_layernorm.weight")
    gate, up = (_linear(g, y, f"{names}mlp.{p}_proj", lang.hidden_size, lang.ffn_hidden_size) for p in ("gate", "up"))
    y = g.node("Mul", g.node("Mul", gate, g.node("Sigmoid", gate)), up)
    return g.node("Add", x, _linear(g, y, names + "mlp.down_proj", lang.ffn_hidden_size, lang.hidden_size))


def _heads(g: Graph, x: str, heads: int, head: int) -> str:
    """[B, S, heads * d] -> [B, heads, S, d]"""
    return g.node("Transpose", g.node("Reshape", x, g.ints(0, 0, heads, head)), perm=[0, 2, 1, 3])


def _rotate(g: Graph, x: str, rope: tuple[str, str]) -> str:
    """Rotary positions in fp32: the first half of a head turns against the second, as in Llama."""
    cos, sin = rope
    x = g.cast(x, TensorProto.FLOAT)
    a, b = g.nodes("Split", x, to=[f"{x}_a", f"{x}_b"], axis=-1, num_outputs=2)
    turned_a = g.node("Sub", g.node("Mul", a, cos), g.node("Mul", b, sin))
    turned_b = g.node("Add", g.node("Mul", b, cos), g.node("Mul", a, sin))
    return g.cast(g.node("Concat", turned_a, turned_b, axis=-1), g.type)


def _linear(g: Graph, x: str, name: str, width_in: int, width_out: int) -> str:
    return g.node("MatMul", x, g.weight(name + ".weight", (width_out, width_in), transposed=True))


def _norm(g: Graph, lang: LanguageConfig, x: str, name: str) -> str:
    """RMSNorm, its mean square in fp32."""
    full = g.cast(x, TensorProto.FLOAT)
    square = g.node("ReduceMean", g.node("Mul", full, full), g.ints(-1), keepdims=1)
    root = g.node("Sqrt", g.node("Add", square, g.scalar(lang.norm_eps, TensorProto.FLOAT)))
    normed = g.cast(g.node("Div", full, root), g.type)
    return g.node("Mul", normed, g.weight(name, (lang.hidden_size,)))
