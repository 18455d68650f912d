"""The names of vision towers, as they stand alone: `vision_tower.…` and the like are spellings of the families."""

from __future__ import annotations

from collections.abc import Callable

from vlm_nemo.model.config import VisionConfig
from vlm_nemo.weights.names.rows import Row, StandIn, Table, linear, norm
from vlm_nemo.weights.transforms import (
    FUSED_QKV,
    GATE_UP,
    IDENTITY,
    PATCH,
    PATCH_FRAMES,
    QKV,
    TWICE_UNSQUEEZED,
    UNSQUEEZED,
    Transform,
)

_OURS = "vision.blocks.layers.{layer}"


def _normed(v: VisionConfig) -> bool:
    """Whether the last norm is there: it is part of the last hidden state, and of no other."""
    return v.post_norm and v.feature_layer in (-1, v.num_layers)


def _blocks(
    layer: str,
    *,
    norms: tuple[str, str],
    qkv: tuple[str, ...],
    proj: str,
    mlp: tuple[str, ...],
) -> tuple[Row, ...]:
    """The rows of every layer. qkv: three matrices or a fused one; mlp: two matrices, or gate, up and down."""
    *first, second = (f"{layer}.{name}" for name in mlp)
    into: Transform = GATE_UP if len(first) == 2 else IDENTITY
    fused: Transform = QKV if len(qkv) == 3 else FUSED_QKV
    attention = f"{_OURS}.self_attention"
    return (
        *norm(f"{_OURS}.input_layernorm", f"{layer}.{norms[0]}"),
        *linear(f"{attention}.linear_qkv", *(f"{layer}.{n}" for n in qkv), transform=fused, bias=lambda v: v.qkv_bias),
        *linear(f"{attention}.linear_proj", f"{layer}.{proj}", bias=lambda v: v.bias),
        *norm(f"{_OURS}.pre_mlp_layernorm", f"{layer}.{norms[1]}"),
        *linear(f"{_OURS}.mlp.linear_fc1", *first, transform=into, bias=lambda v: v.bias),
        *linear(f"{_OURS}.mlp.linear_fc2", second, bias=lambda v: v.bias),
    )


_CLIP_BLOCKS = _blocks(
    "encoder.layers.{layer}",
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
)


def _mllama(ours: str, layer: str, count: Callable[[VisionConfig], int], *, gated: bool) -> tuple[Row, ...]:
    """The rows of one of Llama 3.2 Vision's two stacks of layers."""

    def there(v: VisionConfig, number: int) -> bool:
        return number < count(v)

    heads = (f"{layer}.self_attn.{x}_proj.weight" for x in ("q", "k", "v"))
    gates = [("attention_gate", "gate_attn"), ("mlp_gate", "gate_ffn")] if gated else []
    return (
        *linear(f"{ours}.input_layernorm", f"{layer}.input_layernorm", layers=there),
        Row(ours=f"{ours}.self_attention.linear_qkv.weight", theirs=tuple(heads), transform=QKV, layers=there),
        Row(
            ours=f"{ours}.self_attention.linear_proj.weight",
            theirs=(f"{layer}.self_attn.o_proj.weight",),
            layers=there,
        ),
        *linear(f"{ours}.pre_mlp_layernorm", f"{layer}.post_attention_layernorm", layers=there),
        *linear(f"{ours}.mlp.linear_fc1", f"{layer}.mlp.fc1", layers=there),
        *linear(f"{ours}.mlp.linear_fc2", f"{layer}.mlp.fc2", layers=there),
        *(Row(ours=f"{ours}.{mine}", theirs=(f"{layer}.{theirs}",), layers=there) for mine, theirs in gates),
    )


TOWERS: dict[str, Table] = {
    "clip": Table(
        rows=(
            Row(ours="vision.class_token", theirs=("embeddings.class_embedding",)),
            Row(ours="vision.patch_weight", theirs=("embeddings.patch_embedding.weight",), transform=PATCH),
            Row(ours="vision.position", theirs=("embeddings.position_embedding.weight",)),
            *norm("vision.pre_norm", "pre_layrnorm"),
            *_CLIP_BLOCKS,
        ),
        # CLIP's norm of the pooled class token, which LLaVA never asks for
        idle=(r"post_layernorm\.(weight|bias)", r"embeddings\.position_ids"),
        stand_ins=(
            StandIn(theirs="post_layernorm.weight", value=1, like="vision.pre_norm.weight"),
            StandIn(theirs="post_layernorm.bias", value=0, like="vision.pre_norm.bias"),
        ),
    ),
    "siglip": Table(
        rows=(
            Row(ours="vision.patch_weight", theirs=("embeddings.patch_embedding.weight",), transform=PATCH),
            Row(ours="vision.patch_bias", theirs=("embeddings.patch_embedding.bias",)),
            Row(ours="vision.position", theirs=("embeddings.position_embedding.weight",)),
            *norm("vision.post_norm", "post_layernorm", when=_normed),
            *_CLIP_BLOCKS,
        ),
        idle=(r"post_layernorm\.(weight|bias)", r"embeddings\.position_ids", r"head\..*"),
        stand_ins=(
            StandIn(theirs="post_layernorm.weight", value=1, like="vision.patch_bias"),
            StandIn(theirs="post_layernorm.bias", value=0, like="vision.patch_bias"),
        ),
        when_stood_in=lambda v: not _normed(v),
    ),
    "internvit": Table(
        rows=(
            Row(ours="vision.class_token", theirs=("embeddings.cls_token",), transform=TWICE_UNSQUEEZED),
            Row(
                ours="vision.patch_weight",
                theirs=("embeddings.patch_embeddings.projection.weight",),
                transform=PATCH,
            ),
            Row(ours="vision.patch_bias", theirs=("embeddings.patch_embeddings.projection.bias",)),
            Row(ours="vision.position", theirs=("embeddings.position_embeddings",), transform=UNSQUEEZED),
            *norm("vision.post_norm", "layernorm", when=_normed),
            *_blocks(
                "encoder.layer.{layer}",
                norms=("layernorm_before", "layernorm_after"),
                qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                proj="attention.projection_layer",
                mlp=("mlp.fc1", "mlp.fc2"),
            ),
            *(
                Row(
                    ours=f"{_OURS}.self_attention.{x}_norm.weight",
                    theirs=(f"encoder.layer.{{layer}}.attention.{x}_norm.weight",),
                    when=lambda v: v.qk_norm,
                )
                for x in ("q", "k")
            ),
            Row(ours=f"{_OURS}.attention_scale", theirs=("encoder.layer.{layer}.lambda_1",)),
            Row(ours=f"{_OURS}.mlp_scale", theirs=("encoder.layer.{layer}.lambda_2",)),
        ),
    ),
    "aimv2": Table(
        rows=(
            Row(ours="vision.patch_weight", theirs=("embeddings.patch_embedding.weight",), transform=PATCH),
            Row(ours="vision.patch_bias", theirs=("embeddings.patch_embedding.bias",)),
            Row(ours="vision.position", theirs=("embeddings.position_embedding.weight",)),
            *norm("vision.patch_norm", "embeddings.rms_norm"),
            *norm("vision.post_norm", "rms_norm", when=_normed),
            *_blocks(
                "encoder.layers.{layer}",
                norms=("rms_norm1", "rms_norm2"),
                qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                proj="attention.out_proj",
                mlp=("ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"),
            ),
        ),
        idle=(r"rms_norm\.(weight|bias)", r"embeddings\.position_ids", r"head\..*"),
    ),
    "qwen2_vl": Table(
        rows=(
            Row(ours="vision.patch_weight", theirs=("patch_embed.proj.weight",), transform=PATCH_FRAMES),
            *_blocks(
                "blocks.{layer}",
                norms=("norm1", "norm2"),
                qkv=("attn.qkv",),
                proj="attn.proj",
                mlp=("mlp.fc1", "mlp.fc2"),
            ),
        ),
    ),
    "qwen2_5_vl": Table(
        rows=(
            Row(ours="vision.patch_weight", theirs=("patch_embed.proj.weight",), transform=PATCH_FRAMES),
            *_blocks(
                "blocks.{layer}",
                norms=("norm1", "norm2"),
                qkv=("attn.qkv",),
                proj="attn.proj",
                mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            ),
        ),
    ),
    "eva": Table(
        rows=(
            Row(ours="vision.class_token", theirs=("embeddings.class_embedding",), transform=TWICE_UNSQUEEZED),
            Row(ours="vision.patch_weight", theirs=("embeddings.patch_embedding.weight",), transform=PATCH),
            Row(ours="vision.patch_bias", theirs=("embeddings.patch_embedding.bias",)),
            Row(ours="vision.position", theirs=("embeddings.position_embedding",), transform=UNSQUEEZED),
            *norm("vision.post_norm", "post_layernorm", when=_normed),
            *_blocks(
                "encoder.layers.{layer}",
                norms=("layer_norm1", "layer_norm2"),
                qkv=("self_attn.qkv",),
                proj="self_attn.projection",
                mlp=("mlp.fc1", "mlp.fc2"),
            ),
        ),
        idle=(r"embeddings\.position_ids",),
    ),
    "mllama": Table(
        rows=(
            Row(ours="vision.class_token", theirs=("class_embedding",)),
            Row(ours="vision.patch_weight", theirs=("patch_embedding.weight",), transform=PATCH),
            Row(ours="vision.position", theirs=("gated_positional_embedding.embedding",)),
            Row(ours="vision.tiling.position", theirs=("gated_positional_embedding.tile_embedding.weight",)),
            Row(ours="vision.tiling.position_gate", theirs=("gated_positional_embedding.gate",)),
            *(
                row
                for name, theirs in (("before", "pre"), ("behind", "post"))
                for row in (
                    Row(
                        ours=f"vision.tiling.{name}",
                        theirs=(f"{theirs}_tile_positional_embedding.embedding.weight",),
                    ),
                    Row(ours=f"vision.tiling.{name}_gate", theirs=(f"{theirs}_tile_positional_embedding.gate",)),
                )
            ),
            *linear("vision.pre_norm", "layernorm_pre"),
            *linear("vision.post_norm", "layernorm_post"),
            *_mllama(_OURS, "transformer.layers.{layer}", lambda v: v.num_layers, gated=False),
            *_mllama(
                "vision.global_blocks.layers.{layer}",
                "global_transformer.layers.{layer}",
                lambda v: v.global_layers,
                gated=True,
            ),
        ),
    ),
}
"""By the name that `configs.towers.FORMS` and `families` use."""

TOWERS["internvit_remote"] = Table(
    rows=(
        Row(ours="vision.class_token", theirs=("embeddings.class_embedding",), transform=TWICE_UNSQUEEZED),
        Row(ours="vision.patch_weight", theirs=("embeddings.patch_embedding.weight",), transform=PATCH),
        Row(ours="vision.patch_bias", theirs=("embeddings.patch_embedding.bias",)),
        Row(ours="vision.position", theirs=("embeddings.position_embedding",), transform=UNSQUEEZED),
        *_blocks(
            "encoder.layers.{layer}",
            norms=("norm1", "norm2"),
            qkv=("attn.qkv",),
            proj="attn.proj",
            mlp=("mlp.fc1", "mlp.fc2"),
        ),
        *(
            Row(
                ours=f"{_OURS}.self_attention.{x}_norm.weight",
                theirs=(f"encoder.layers.{{layer}}.attn.{x}_norm.weight",),
                when=lambda v: v.qk_norm,
            )
            for x in ("q", "k")
        ),
        Row(ours=f"{_OURS}.attention_scale", theirs=("encoder.layers.{layer}.ls1",)),
        Row(ours=f"{_OURS}.mlp_scale", theirs=("encoder.layers.{layer}.ls2",)),
    ),
)
"""InternViT as OpenGVLab's own code names it; read, never written."""
