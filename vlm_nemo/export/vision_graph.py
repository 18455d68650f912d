"""The vision graph: uint8 pixels -> CLIP tower -> projector -> image embeddings.

pixels [N, 3, S, S] uint8 -> image_embeds [N, T, D]. Pixels are normalised inside, in fp32, so that a device is sent
bytes and nobody has to know mean and deviation.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.export.graph import Graph
from vlm_nemo.export.tensors import TensorFile
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.vision import layers_used

TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."


def vision_graph(cfg: ModelConfig, data: TensorFile) -> Graph:
    """The graph of a model's tower and projector; its weights are reserved in `data`."""
    g = Graph("vision", data)
    v = cfg.vision
    spec = spec_of(cfg)
    tokens = view_tokens(spec, spec.grid)
    pixels = g.input("pixels", TensorProto.UINT8, ["N", 3, v.image_size, v.image_size])
    x = _patches(g, cfg, pixels)
    for i in range(layers_used(v)):
        x = _layer(g, cfg, x, f"{TOWER}encoder.layers.{i}.")
    if v.class_token and not v.keep_class_token:
        x = g.node("Slice", x, g.ints(1), g.ints(tokens + 1), g.ints(1))
    _projector(g, cfg, x)
    g.output("image_embeds", g.type, ["N", tokens, cfg.language.hidden_size])
    return g


def _patches(g: Graph, cfg: ModelConfig, pixels: str) -> str:
    """[N, 3, S, S] uint8 -> [N, P, D]: a convolution without overlap is a matrix product of flattened patches."""
    v = cfg.vision
    width, patch, grid = v.hidden_size, v.patch_size, v.image_size // v.patch_size
    mean, std = (np.array(x, dtype=np.float32).reshape(1, 3, 1, 1) * np.float32(255) for x in (v.mean, v.std))
    x = g.node("Sub", g.cast(pixels, TensorProto.FLOAT), g.table("pixel_mean", mean))
    x = g.cast(g.node("Div", x, g.table("pixel_std", std)), g.type)
    x = g.node("Reshape", x, g.ints(-1, 3, grid, patch, grid, patch))
    x = g.node("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    x = g.node("Reshape", x, g.ints(-1, grid * grid, 3 * patch * patch))
    names = TOWER + "embeddings."
    x = g.node("MatMul", x, g.weight(names + "patch_embedding.weight", (width, 3, patch, patch), transposed=True))
    if v.class_token:
        count = g.node("Shape", x, start=0, end=1)
        shape = g.node("Concat", count, g.ints(1, width), axis=0)
        x = g.node("Concat", g.node("Expand", g.weight(names + "class_embedding", (width,)), shape), x, axis=1)
    positions = g.weight(names + "position_embedding.weight", (grid * grid + int(v.class_token), width))
    x = g.node("Add", x, positions)
    # "layrnorm" is how CLIP's authors spelled it
    return _norm(g, cfg, x, TOWER + "pre_layrnorm") if v.pre_norm else x


def _layer(g: Graph, cfg: ModelConfig, x: str, names: str) -> str:
    v = cfg.vision
    width, heads = v.hidden_size, v.num_heads
    y = _norm(g, cfg, x, names + "layer_norm1")
    split = g.ints(0, -1, heads, width // heads)
    q, k, w = (
        g.node(
            "Transpose",
            g.node("Reshape", _linear(g, y, f"{names}self_attn.{part}_proj", width, width), split),
            perm=[0, 2, 1, 3],
        )
        for part in "qkv"
    )
    y = g.node("Transpose", g.node("Attention", q, k, w), perm=[0, 2, 1, 3])
    y = g.node("Reshape", y, g.ints(0, -1, width))
    x = g.node("Add", x, _linear(g, y, names + "self_attn.out_proj", width, width))
    y = _norm(g, cfg, x, names + "layer_norm2")
    y = _activation(g, v.activation, _linear(g, y, names + "mlp.fc1", width, v.ffn_hidden_size))
    return g.node("Add", x, _linear(g, y, names + "mlp.fc2", v.ffn_hidden_size, width))


def _projector(g: Graph, cfg: ModelConfig, x: str) -> None:
    """LLaVA's: one linear layer, or linear, activation, linear."""
    width_in, width_out = cfg.vision.hidden_size, cfg.language.hidden_size
    if cfg.projector.num_layers == 2:
        x = _linear(g, x, PROJECTOR + "linear_1", width_in, width_out)
        x = _activation(g, cfg.projector.activation, x)
        _linear(g, x, PROJECTOR + "linear_2", width_out, width_out, to="image_embeds")
    else:
        _linear(g, x, PROJECTOR + "linear_1", width_in, width_out, to="image_embeds")


def _linear(g: Graph, x: str, name: str, width_in: int, width_out: int, to: str | None = None) -> str:
    product = g.node("MatMul", x, g.weight(name + ".weight", (width_out, width_in), transposed=True))
    return g.node("Add", product, g.weight(name + ".bias", (width_out,)), to=to)


def _norm(g: Graph, cfg: ModelConfig, x: str, name: str) -> str:
    weight, bias = (g.weight(f"{name}.{end}", (cfg.vision.hidden_size,)) for end in ("weight", "bias"))
    return g.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=cfg.vision.norm_eps)


def _activation(g: Graph, kind: str, x: str) -> str:
    if kind == "quick_gelu":
        return g.node("Mul", x, g.node("Sigmoid", g.node("Mul", x, g.scalar(1.702))))
    return g.node("Gelu", x)
