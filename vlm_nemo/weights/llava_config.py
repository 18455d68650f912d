"""LLaVA-1.5's configuration both ways: config.json as Hugging Face writes it, and our ModelConfig.

What our model does not do is refused by field and value: a silent difference would be another model. Published files
leave out what equals their class's default, so those defaults are part of the format and listed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlm_nemo.data.layout import image_spec
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from vlm_nemo.types import UserError
from vlm_nemo.weights.preprocessing import read_preprocessing

if TYPE_CHECKING:
    from vlm_nemo.weights.hf import HFFolder

CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LLAVA_VISION_DEFAULTS: dict[str, Any] = {
    **CLIP_DEFAULTS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Where a LLaVA's config.json has no vision_config at all."""
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
}
LLAVA_DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
NEUTRAL_MEGATRON = ("recompute_", "cpu_offloading", "tp_comm_", "deterministic_mode")
"""Beginnings of megatron fields that change how the same numbers come about, not which model it is."""


def model_config_of(*folders: HFFolder, feature_layer: int = -2) -> ModelConfig:
    """Our configuration of what the folders hold together; a part that none of them gives has our defaults.

    feature_layer: the hidden state to take from a vision tower that stands alone; a LLaVA says it itself.
    Raises UserError naming a field and its value where we do not do what it asks for.
    """
    cfg = ModelConfig()
    for folder in folders:
        config, where = folder.config, str(folder.path / "config.json")
        if config.get("quantization_config"):
            raise _refuse(where, "quantization_config", config["quantization_config"], "it does whole weights")
        if folder.family == "llava":
            vision = config.get("vision_config")
            base = LLAVA_VISION_DEFAULTS if vision is None else CLIP_DEFAULTS
            top = {**LLAVA_DEFAULTS, **config}
            cfg.vision = _select(top, _vision({**base, **(vision or {})}, where), where)
            cfg.projector = _projector(top, where)
            cfg.language = _language(config.get("text_config") or {}, where)
        elif folder.family == "clip":
            vision = config["vision_config"] if "vision_config" in config else config
            cfg.vision = replace(_vision({**CLIP_DEFAULTS, **vision}, where), feature_layer=feature_layer)
        else:
            cfg.language = _language(config, where)
        if "vision" in folder.parts:
            cfg.vision = read_preprocessing(folder.path, cfg.vision)
        if "language" in folder.parts:
            cfg.language.tied_embeddings = folder.tied()
    return cfg


def _refuse(where: str, field: str, value: Any, only: str) -> UserError:
    return UserError(f"{where}: {field}={value!r} is not something this version does; {only}")


def _demand(where: str, config: Mapping[str, Any], field: str, allowed: Sequence[Any]) -> Any:
    value = config[field]
    if value not in allowed:
        raise _refuse(where, field, value, f"it does {', '.join(repr(v) for v in allowed)}")
    return value


def _vision(config: Mapping[str, Any], where: str) -> VisionConfig:
    where += " (vision)"
    kind = config.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise _refuse(where, "model_type", kind, "it does 'clip_vision_model'")
    _demand(where, config, "num_channels", (3,))
    if not isinstance(config["image_size"], int) or not isinstance(config["patch_size"], int):
        raise _refuse(where, "image_size", config["image_size"], "it does squares: one number")
    return VisionConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        activation=_demand(where, config, "hidden_act", ("quick_gelu", "gelu")),
        norm_eps=float(config["layer_norm_eps"]),
        aspect="crop",
    )


def _select(top: Mapping[str, Any], vision: VisionConfig, where: str) -> VisionConfig:
    """Which hidden state, with or without the class token."""
    layer = top["vision_feature_layer"]
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        raise _refuse(where, "vision_feature_layer", layer, "it takes the features of one layer")
    kept = _demand(where, top, "vision_feature_select_strategy", ("default", "full")) == "full"
    return replace(vision, feature_layer=layer, keep_class_token=kept)


def _projector(top: Mapping[str, Any], where: str) -> ProjectorConfig:
    _demand(where, top, "multimodal_projector_bias", (True,))
    activation = _demand(where, top, "projector_hidden_act", ("gelu", "quick_gelu"))
    return ProjectorConfig(num_layers=2, activation=activation)


def _language(given: Mapping[str, Any], where: str) -> LanguageConfig:
    where += " (language)"
    config = {**LLAMA_DEFAULTS, **given}
    kind = config.get("model_type", "llama")
    if kind != "llama":
        raise _refuse(where, "model_type", kind, "it does 'llama'")
    for field, allowed in (("hidden_act", ("silu",)), ("attention_bias", (False,)), ("mlp_bias", (False,))):
        _demand(where, config, field, allowed)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config["head_dim"] not in (None, width // heads):
        raise _refuse(where, "head_dim", config["head_dim"], f"it does hidden_size / heads = {width // heads}")
    return LanguageConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"] or heads,
        ffn_hidden_size=config["intermediate_size"],
        rope_base=_rope_base(config, where),
        norm_eps=float(config["rms_norm_eps"]),
        tied_embeddings=bool(config["tie_word_embeddings"]),
        max_positions=config["max_position_embeddings"],
    )


def _rope_base(config: Mapping[str, Any], where: str) -> float:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 both in rope_parameters."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_parameters") or {})}
    scaling = config.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
        raise _refuse(where, "rope_scaling", scaling, "it does ordinary rotary positions (null)")
    if kind != "default":
        raise _refuse(where, "rope_parameters.rope_type", kind, "it does 'default'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(where, "rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "it does 1.0")
    return float(rope["rope_theta"])


def check_exportable(cfg: ModelConfig, parts: Sequence[str]) -> None:
    """Raises UserError naming the key of a model that LLaVA-1.5's classes cannot express."""

    def refuse(key: str, value: Any, only: str) -> UserError:
        return UserError(f"{key}={value}: Hugging Face's LLaVA-1.5 has no such model; {only}")

    if "vision" in parts:
        for name in ("class_token", "pre_norm"):
            if not getattr(cfg.vision, name):
                raise refuse(f"model.vision.{name}", "false", f"CLIP has {name.replace('_', ' ')}")
    if "projector" in parts and cfg.projector.num_layers != 2:
        raise refuse("model.projector.num_layers", cfg.projector.num_layers, "its projector has 2 layers")
    for name, value in cfg.megatron.items() if "language" in parts else ():
        if not name.startswith(NEUTRAL_MEGATRON):
            raise refuse(f"model.megatron.{name}", value, "Llama has no such field")


def hf_config_of(
    cfg: ModelConfig, tokenizer: Tokenizer | None, *, dtype: str = "float32", part: str | None = None
) -> dict[str, Any]:
    """config.json of a model, in the hub's spelling (transformers 4), which transformers 5 reads as well.

    dtype: the type of the weights, as torch spells it. part: vision or language, for a tower or a decoder alone.
    tokenizer: says the special ids; None only for a vision tower.
    """
    vision = _hf_vision(cfg.vision)
    if part == "vision":
        return {"architectures": ["CLIPVisionModel"], **vision, "torch_dtype": dtype}
    assert tokenizer is not None
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    language = {"architectures": ["LlamaForCausalLM"], **_hf_language(cfg.language), **ids, "torch_dtype": dtype}
    if part == "language":
        return language
    v = cfg.vision
    kept = v.class_token and v.keep_class_token
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": tokenizer.image_id,
        "image_seq_length": image_spec(v.image_size, v.patch_size, kept, v.aspect, tuple(v.mean)).tokens,
        "projector_hidden_act": cfg.projector.activation,
        "multimodal_projector_bias": True,
        "vision_feature_layer": v.feature_layer,
        "vision_feature_select_strategy": "full" if kept else "default",
        "vision_config": vision,
        "text_config": language,
        "vocab_size": cfg.language.vocab_size,
        "tie_word_embeddings": cfg.language.tied_embeddings,
        **ids,
        "torch_dtype": dtype,
    }


def _hf_vision(cfg: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_channels": 3,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "hidden_act": cfg.activation,
        "layer_norm_eps": cfg.norm_eps,
    }


def _hf_language(cfg: LanguageConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": cfg.tied_embeddings,
    }
