"""The names of projectors, as their families have them."""

from __future__ import annotations

from vlm_nemo.model.config import ProjectorConfig
from vlm_nemo.weights.names.rows import Row, Table, linear, norm
from vlm_nemo.weights.transforms import BEFORE_IDENTITY, KV, QKV, TRANSPOSED, UNSQUEEZED


def _one(p: ProjectorConfig) -> bool:
    return p.num_layers == 1


def _two(p: ProjectorConfig) -> bool:
    return p.num_layers == 2


def _bias(p: ProjectorConfig) -> bool:
    return p.bias


_MLP = (
    *linear("projector.layers.linear_fc1", "linear_1", when=_two, bias=_bias),
    *linear("projector.layers.linear_fc2", "linear_2", when=_two, bias=_bias),
)

_O, _T = "projector.layers.{layer}", "qformer.encoder.layer.{layer}"


def _looks(p: ProjectorConfig, layer: int) -> bool:
    """Whether a layer of the Q-Former looks at the image."""
    return layer % p.cross_attention_every == 0


_QFORMER = (
    *linear(
        f"{_O}.self_attention.linear_qkv",
        *(f"{_T}.attention.attention.{x}" for x in ("query", "key", "value")),
        transform=QKV,
    ),
    *linear(f"{_O}.self_attention.linear_proj", f"{_T}.attention.output.dense"),
    *linear(f"{_O}.self_attention_norm", f"{_T}.attention.output.LayerNorm"),
    *linear(f"{_O}.cross_attention.linear_q", f"{_T}.crossattention.attention.query", layers=_looks),
    *linear(
        f"{_O}.cross_attention.linear_kv",
        *(f"{_T}.crossattention.attention.{x}" for x in ("key", "value")),
        transform=KV,
        layers=_looks,
    ),
    *linear(f"{_O}.cross_attention.linear_proj", f"{_T}.crossattention.output.dense", layers=_looks),
    *linear(f"{_O}.cross_attention_norm", f"{_T}.crossattention.output.LayerNorm", layers=_looks),
    *linear(f"{_O}.mlp.linear_fc1", f"{_T}.intermediate_query.dense"),
    *linear(f"{_O}.mlp.linear_fc2", f"{_T}.output_query.dense"),
    *linear(f"{_O}.mlp_norm", f"{_T}.output_query.LayerNorm"),
)

PROJECTORS: dict[str, Table] = {
    "llava": Table(
        rows=(
            *_MLP,
            # Hugging Face's LLaVA has two layers always
            *linear("projector.layers", "linear_1", "linear_2", transform=BEFORE_IDENTITY, when=_one, bias=_bias),
            Row(ours="projector.newline", theirs=("image_newline",), when=lambda p: p.newline),
        )
    ),
    "internvl": Table(rows=(*norm("projector.norm", "layer_norm"), *_MLP)),
    "internvl_remote": Table(
        rows=(
            *norm("projector.norm", "0"),
            *linear("projector.layers.linear_fc1", "1"),
            *linear("projector.layers.linear_fc2", "3"),
        )
    ),
    "qwen2_vl": Table(
        rows=(
            *norm("projector.norm", "ln_q"),
            *linear("projector.layers.linear_fc1", "mlp.0"),
            *linear("projector.layers.linear_fc2", "mlp.2"),
        )
    ),
    "gemma3": Table(
        rows=(
            Row(ours="projector.norm.weight", theirs=("mm_soft_emb_norm.weight",)),
            Row(ours="projector.layers.weight", theirs=("mm_input_projection_weight",), transform=TRANSPOSED),
        )
    ),
    "mllama": Table(rows=tuple(Row(ours=f"projector.layers.{end}", theirs=(end,)) for end in ("weight", "bias"))),
    "idefics3": Table(rows=(Row(ours="projector.layers.weight", theirs=("modality_projection.proj.weight",)),)),
    "ovis2": Table(
        rows=(
            Row(ours="projector.head.weight", theirs=("head_linear.weight",)),
            *linear("projector.norm", "head_norm"),
            Row(ours="projector.table.weight", theirs=("visual_embeddings_table.weight",)),
        )
    ),
    "blip2": Table(
        rows=(
            Row(ours="projector.queries", theirs=("query_tokens",), transform=UNSQUEEZED),
            *linear("projector.norm", "qformer.layernorm"),
            *_QFORMER,
            *linear("projector.output", "language_projection"),
        )
    ),
}
