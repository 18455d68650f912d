"""The vision towers of config.json, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm_nemo.model.config import VisionConfig
from vlm_nemo.weights.configs.forms import Field, Form, activation, misfits, read_form, square, write_form

_FREE = frozenset({"keep_class_token", "feature_layer", "position_init_std", "mean", "std"})
_HALF = [0.5, 0.5, 0.5]


def _sizes(
    *,
    width: tuple[str, int],
    ffn: tuple[str, int],
    layers: tuple[str, int],
    heads: tuple[str, int],
    patch: int,
    image: int | None,
    eps: tuple[str, float] | None = None,
    act: tuple[str, ...],
) -> tuple[Field, ...]:
    """The fields that all towers have; (their name, their default). act: their names, the default first."""
    read, write = activation(*act)
    found = [
        Field(ours="hidden_size", theirs=width[0], default=width[1]),
        Field(ours="ffn_hidden_size", theirs=ffn[0], default=ffn[1]),
        Field(ours="num_layers", theirs=layers[0], default=layers[1]),
        Field(ours="num_heads", theirs=heads[0], default=heads[1]),
        Field(ours="patch_size", theirs="patch_size", default=patch, read=square),
        Field(ours="activation", theirs="hidden_act", default=act[0], read=read, write=write),
    ]
    if image is not None:
        found.append(Field(ours="image_size", theirs="image_size", default=image, read=square))
    if eps is not None:
        found.append(Field(ours="norm_eps", theirs=eps[0], default=eps[1], read=float))
    return tuple(found)


def _usual(width: int, ffn: int, layers: int, heads: int, **more: Any) -> tuple[Field, ...]:
    return _sizes(
        width=("hidden_size", width),
        ffn=("intermediate_size", ffn),
        layers=("num_hidden_layers", layers),
        heads=("num_attention_heads", heads),
        **more,
    )


_SIGLIP_FIELDS = _usual(
    768,
    3072,
    12,
    12,
    patch=16,
    image=224,
    eps=("layer_norm_eps", 1e-6),
    act=("gelu_pytorch_tanh", "gelu", "quick_gelu"),
)
_SIGLIP_SWITCHES = dict(patch_bias=True, class_token=False, pre_norm=False)

FORMS: dict[str, Form] = {
    "clip": Form(
        model_types=("clip_vision_model", "clip"),
        fields=_usual(768, 3072, 12, 12, patch=32, image=224, eps=("layer_norm_eps", 1e-5), act=("quick_gelu", "gelu")),
        demands={"num_channels": (3,)},
        says=("num_channels",),
        free=_FREE,
    ),
    "siglip": Form(
        model_types=("siglip_vision_model", "siglip"),
        fields=_SIGLIP_FIELDS,
        always=_SIGLIP_SWITCHES,
        demands={"num_channels": (3,)},
        says=("num_channels",),
        free=_FREE | {"post_norm"},
    ),
    "internvit": Form(
        model_types=("internvl_vision",),
        fields=(
            *_usual(1024, 4096, 24, 16, patch=14, image=448, eps=("layer_norm_eps", 1e-6), act=("gelu",)),
            Field(ours="qkv_bias", theirs="attention_bias", default=False, read=bool),
            Field(ours="qk_norm", theirs="use_qk_norm", default=False, read=bool),
            Field(
                ours="norm",
                theirs="norm_type",
                default="layer_norm",
                read=lambda name: {"layer_norm": "layernorm", "rms_norm": "rmsnorm"}.get(name, name),
                write=lambda ours: {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[ours],
            ),
            Field(ours="layer_scale", theirs="layer_scale_init_value", default=0.1, read=float),
            Field(
                ours="post_norm",
                theirs="use_mean_pooling",
                default=True,
                read=lambda pooled: not pooled,
                write=lambda ours: not ours,
            ),
        ),
        always=dict(patch_bias=True, pre_norm=False),
        demands={"num_channels": (3,), "use_absolute_position_embeddings": (True,), "use_mask_token": (False,)},
        says=("num_channels", "use_absolute_position_embeddings", "use_mask_token"),
        free=_FREE,
    ),
    "aimv2": Form(
        model_types=("aimv2_vision_model", "aimv2"),
        fields=_usual(1024, 2816, 24, 8, patch=14, image=224, eps=("rms_norm_eps", 1e-5), act=("silu",)),
        always=dict(
            patch_bias=True,
            class_token=False,
            pre_norm=False,
            patch_norm=True,
            post_norm=True,
            norm="rmsnorm",
            gated=True,
            qkv_bias=False,
            bias=False,
        ),
        demands={"num_channels": (3,), "qkv_bias": (False,), "mlp_bias": (False,), "is_native": (False,)},
        says=("num_channels", "qkv_bias", "mlp_bias"),
        free=_FREE,
    ),
    "qwen2_5_vl": Form(
        model_types=("qwen2_5_vl_vision", "qwen2_5_vl", ""),
        fields=(
            *_sizes(
                width=("hidden_size", 1280),
                ffn=("intermediate_size", 3420),
                layers=("depth", 32),
                heads=("num_heads", 16),
                patch=14,
                image=None,
                act=("silu",),
            ),
            Field(ours="temporal_patch_size", theirs="temporal_patch_size", default=2),
            Field(ours="window", theirs="window_size", default=112),
            Field(ours="full_attention_layers", theirs="fullatt_block_indexes", default=(7, 15, 23, 31), read=list),
        ),
        always=dict(
            class_token=False, pre_norm=False, position="rope", norm="rmsnorm", norm_eps=1e-6, gated=True, bias=True
        ),
        demands={"in_channels": (3,)},
        free=_FREE | {"image_size"},
    ),
    "qwen2_vl": Form(
        model_types=("qwen2_vl_vision", "qwen2_vl", ""),
        fields=(
            *_sizes(
                width=("embed_dim", 1280),
                ffn=("ffn", 5120),
                layers=("depth", 32),
                heads=("num_heads", 16),
                patch=14,
                image=None,
                act=("quick_gelu",),
            ),
            Field(ours="temporal_patch_size", theirs="temporal_patch_size", default=2),
        ),
        always=dict(class_token=False, pre_norm=False, position="rope", norm_eps=1e-6),
        demands={"in_channels": (3,)},
        free=_FREE | {"image_size"},
    ),
    "mllama": Form(
        model_types=("mllama_vision_model", ""),
        fields=(
            *_sizes(
                width=("hidden_size", 1280),
                ffn=("intermediate_size", 5120),
                layers=("num_hidden_layers", 32),
                heads=("attention_heads", 16),
                patch=14,
                image=448,
                act=("gelu",),
            ),
            Field(ours="tiles", theirs="max_num_tiles", default=4),
            Field(ours="global_layers", theirs="num_global_layers", default=8),
            Field(ours="kept_layers", theirs="intermediate_layers_indices", default=(3, 7, 15, 23, 30), read=list),
        ),
        always=dict(qkv_bias=False, output_bias=False, post_norm=True),
        # Of the norms before and behind the layers the class knows no other
        demands={"norm_eps": (1e-5,), "num_channels": (3,)},
        says=("norm_eps", "num_channels"),
        free=_FREE,
    ),
    "eva": Form(
        model_types=("blip_2_vision_model", ""),
        fields=(
            *_usual(1408, 6144, 39, 16, patch=14, image=224, eps=("layer_norm_eps", 1e-6), act=("gelu",)),
            Field(ours="qkv_bias", theirs="qkv_bias", default=True, read=bool),
        ),
        always=dict(patch_bias=True, pre_norm=False, post_norm=True),
        free=_FREE,
    ),
}
"""By the name that `names.towers.TOWERS` uses."""


def _defaults(form: Form, **values: Any) -> Form:
    """The same kind where files leave out other values."""
    return replace(form, fields=tuple(replace(f, default=values.get(f.theirs, f.default)) for f in form.fields))


VARIANTS: dict[str, Form] = {
    # Where a LLaVA's config.json has no vision_config at all
    "llava": _defaults(
        FORMS["clip"],
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    "ovis2": replace(
        FORMS["aimv2"],
        model_types=("ovis2_vision", ""),
        demands={name: allowed for name, allowed in FORMS["aimv2"].demands.items() if name != "is_native"},
    ),
    "idefics3": replace(
        _defaults(FORMS["siglip"], hidden_size=1152, num_attention_heads=16, patch_size=32),
        model_types=("idefics3_vision", "idefics3", ""),
    ),
    "smolvlm": replace(
        _defaults(FORMS["siglip"], hidden_size=1152, num_attention_heads=16, patch_size=32),
        model_types=("smolvlm_vision", "smolvlm", "idefics3_vision", "idefics3", ""),
    ),
}
"""Towers of the same names under another model_type, or with other defaults."""

COLOURS: dict[str, tuple[list[float], list[float]]] = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": (_HALF, _HALF),
    "internvit": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
"""Mean and deviation of a tower's own preprocessing; CLIP's, if it is not here."""


def read_tower(name: str, given: Mapping[str, Any], where: str, variant: str | None = None) -> VisionConfig:
    """Our configuration of a `vision_config`. Raises UserError."""
    form = VARIANTS[variant] if variant else FORMS[name]
    mean, std = COLOURS.get(name, COLOURS["clip"])
    values = read_form(form, _completed(name, given), f"{where} (vision)")
    vision = VisionConfig(**{"mean": list(mean), "std": list(std), **values})
    return vision if "image_size" in values else replace(vision, image_size=32 * vision.patch_size)


def write_tower(name: str, cfg: VisionConfig, variant: str | None = None) -> dict[str, Any]:
    """The `vision_config` of a tower."""
    found = write_form(VARIANTS[variant] if variant else FORMS[name], cfg)
    if name == "qwen2_vl":
        found["mlp_ratio"] = found.pop("ffn") // cfg.hidden_size
    if name == "internvit":
        found |= {side: [found[side], found[side]] for side in ("image_size", "patch_size")}
    return found


def tower_of(given: Mapping[str, Any], allowed: Sequence[str]) -> str:
    """The tower that a `vision_config` describes, by its model_type; the first allowed where it says none of them."""
    kind = given.get("model_type", "")
    return next((name for name in allowed if kind in FORMS[name].model_types), allowed[0])


def fitting_tower(cfg: VisionConfig, allowed: Sequence[str]) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Of the towers allowed the one that a model's is, and where it still differs: the least of them."""
    found = [(name, misfits(FORMS[name], cfg)) for name in allowed]
    if "qwen2_vl" in allowed and cfg.ffn_hidden_size % cfg.hidden_size:  # config.json has their ratio
        dict(found)["qwen2_vl"].append(("ffn_hidden_size", cfg.ffn_hidden_size, f"multiples of {cfg.hidden_size}"))
    return min(found, key=lambda pair: len(pair[1]))


def _completed(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a file says as null; Qwen2-VL's ratio as the width that it means."""
    said = {key: value for key, value in given.items() if value is not None}
    if name == "qwen2_vl":
        said["ffn"] = int(said.get("embed_dim", 1280) * said.get("mlp_ratio", 4))
    return said
