"""The families as data: which class and files of Hugging Face's, which parts, which names, which switches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.weights.configs import blip, gemma, idefics, internvl, llava, mllama, ovis, qwen_vl
from vlm_nemo.weights.configs.common import Words
from vlm_nemo.weights.spelling import PREFIXES, Prefixes


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that has a class of Hugging Face's."""

    architecture: str
    model_type: str
    processor: str
    image_processor: str
    prefixes: Prefixes
    towers: tuple[str, ...]
    """Names in names.towers.TOWERS that it may have."""
    languages: tuple[str, ...]
    """Names in configs.languages.FORMS that it may have."""
    projector: str
    """Name in names.projectors.PROJECTORS."""
    template: str
    """In data.chat.TEMPLATES: what is taken where a folder has somebody else's chat template."""
    image_text: str = "<image>\n"
    """What stands for an image in a chat template, until the processor puts placeholders there."""
    images_first: bool = True
    """Whether a turn's images come before its text, as in LLaVA's templates; otherwise they stay where they are."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks the tokenizer for by role."""
    read: Callable[[str, Mapping[str, Any], str], ModelConfig]
    """(family, config.json, its path) -> ours"""
    write: Callable[[str, ModelConfig, Words], dict[str, Any]]
    """The inverse, without architectures, model_type and dtype."""
    vision: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ours that the family decides; the same of the others below."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    reduce: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none"})
    projection: Mapping[str, Any] = field(default_factory=dict)
    projection_free: frozenset[str] = frozenset()
    """Fields of the projector that a model may have in any way."""
    language: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    """Whether embedding and head are one where config.json does not say."""
    tower_variant: str | None = None
    """Name in configs.towers.VARIANTS, where the tower's section has its own model_type."""


_CLIP_LIKE = dict(
    towers=llava.TOWERS,
    languages=llava.LANGUAGES,
    projector="llava",
    read=llava.read,
    write=llava.write,
    vision={"post_norm": False},
)
_MLP_FREE = frozenset({"num_layers", "activation", "bias"})

_IDEFICS3 = Family(
    architecture="Idefics3ForConditionalGeneration",
    model_type="idefics3",
    processor="Idefics3Processor",
    image_processor="Idefics3ImageProcessor",
    prefixes=PREFIXES["idefics3"],
    towers=("siglip",),
    languages=idefics.LANGUAGES,
    projector="idefics3",
    template="idefics3",
    read=idefics.read,
    write=idefics.write,
    vision={"feature_layer": -1, "post_norm": True},
    layout={"kind": "rows"},
    reduce={"kind": "pixel_shuffle"},
    projection=idefics.PROJECTOR,
    tower_variant="idefics3",
    image_text="<image>",
    images_first=False,
)

FAMILIES: dict[str, Family] = {
    "llava": Family(
        architecture="LlavaForConditionalGeneration",
        model_type="llava",
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessor",
        prefixes=PREFIXES["llava"],
        template="vicuna",
        layout={"kind": "square"},
        projection_free=_MLP_FREE,
        **_CLIP_LIKE,  # type: ignore[arg-type]
    ),
    "llava_next": Family(
        architecture="LlavaNextForConditionalGeneration",
        model_type="llava_next",
        processor="LlavaNextProcessor",
        image_processor="LlavaNextImageProcessor",
        prefixes=PREFIXES["llava_next"],
        template="vicuna",
        layout={"kind": "anyres", "max_unpadded": None, "tiles_if_alone": False},
        projection={"newline": True},
        projection_free=_MLP_FREE,
        **_CLIP_LIKE,  # type: ignore[arg-type]
    ),
    "llava_onevision": Family(
        architecture="LlavaOnevisionForConditionalGeneration",
        model_type="llava_onevision",
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessor",
        prefixes=PREFIXES["llava_next"],
        template="onevision",
        layout={"kind": "anyres", "tiles_if_alone": True},
        projection={"newline": True},
        projection_free=_MLP_FREE,
        **_CLIP_LIKE,  # type: ignore[arg-type]
        tokens={"image_token": "<image>", "video_token": "<video>"},
    ),
    "internvl": Family(
        architecture="InternVLForConditionalGeneration",
        model_type="internvl",
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessor",
        prefixes=PREFIXES["internvl"],
        towers=("internvit",),
        languages=internvl.LANGUAGES,
        projector="internvl",
        template="chatml",
        read=internvl.read,
        write=internvl.write,
        vision={"keep_class_token": False},
        layout=internvl.LAYOUT,
        reduce={"kind": "pixel_shuffle"},
        projection=internvl.PROJECTOR,
        tied=True,
        image_text="<IMG_CONTEXT>\n",
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "qwen2_vl": Family(
        architecture="Qwen2VLForConditionalGeneration",
        model_type="qwen2_vl",
        processor="Qwen2VLProcessor",
        image_processor="Qwen2VLImageProcessor",
        prefixes=PREFIXES["qwen2_vl"],
        towers=("qwen2_vl",),
        languages=("qwen2_vl",),
        projector="qwen2_vl",
        template="qwen",
        read=qwen_vl.read,
        write=qwen_vl.write,
        vision={"feature_layer": -1},
        layout=qwen_vl.LAYOUT,
        reduce={"kind": "merge"},
        projection={"norm": "layernorm", "norm_place": "patch", "norm_eps": 1e-6},
        projection_free=frozenset({"hidden_size"}),
        image_text="<|vision_start|><|image_pad|><|vision_end|>",
        images_first=False,
        tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    ),
    "qwen2_5_vl": Family(
        architecture="Qwen2_5_VLForConditionalGeneration",
        model_type="qwen2_5_vl",
        processor="Qwen2_5_VLProcessor",
        image_processor="Qwen2VLImageProcessor",
        prefixes=PREFIXES["qwen2_vl"],
        towers=("qwen2_5_vl",),
        languages=("qwen2_5_vl",),
        projector="qwen2_vl",
        template="qwen",
        read=qwen_vl.read,
        write=qwen_vl.write,
        vision={"feature_layer": -1},
        layout=qwen_vl.LAYOUT,
        reduce={"kind": "merge"},
        projection={"norm": "rmsnorm", "norm_place": "patch", "norm_eps": 1e-6},
        projection_free=frozenset({"hidden_size"}),
        image_text="<|vision_start|><|image_pad|><|vision_end|>",
        images_first=False,
        tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    ),
    "ovis2": Family(
        architecture="Ovis2ForConditionalGeneration",
        model_type="ovis2",
        processor="Ovis2Processor",
        image_processor="Ovis2ImageProcessor",
        prefixes=PREFIXES["ovis2"],
        towers=("aimv2",),
        languages=ovis.LANGUAGES,
        projector="ovis2",
        template="qwen",
        read=ovis.read,
        write=ovis.write,
        vision={"feature_layer": -1},
        layout={"kind": "ovis"},
        reduce={},
        projection={"kind": "visual_vocabulary", "indicators": len(ovis.INDICATORS), "temperature": 1.0},
        projection_free=frozenset({"vocabulary", "tokenize"}),
        tied=True,
        tower_variant="ovis2",
    ),
    "gemma3": Family(
        architecture="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessor",
        prefixes=PREFIXES["llava"],
        towers=("siglip",),
        languages=("gemma3",),
        projector="gemma3",
        template="gemma",
        read=gemma.read,
        write=gemma.write,
        vision={"feature_layer": -1, "post_norm": True},
        layout=gemma.LAYOUT,
        reduce={"kind": "average_pool"},
        projection=gemma.PROJECTOR,
        projection_free=frozenset({"norm_eps"}),
        language={"image_attention": "bidirectional"},
        tied=True,
        image_text="<start_of_image>",
        images_first=False,
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": replace(
        _IDEFICS3,
        architecture="SmolVLMForConditionalGeneration",
        model_type="smolvlm",
        processor="SmolVLMProcessor",
        image_processor="SmolVLMImageProcessor",
        tower_variant="smolvlm",
    ),
    "mllama": Family(
        architecture="MllamaForConditionalGeneration",
        model_type="mllama",
        processor="MllamaProcessor",
        image_processor="MllamaImageProcessor",
        prefixes=PREFIXES["mllama"],
        towers=("mllama",),
        languages=("mllama",),
        projector="mllama",
        template="llama32",
        read=mllama.read,
        write=mllama.write,
        vision={"feature_layer": -1, "keep_class_token": True},
        layout={"kind": "canvas"},
        projection=mllama.PROJECTOR,
        # There is one linear layer, whatever these say
        projection_free=frozenset({"num_layers", "activation"}),
        image_text="<|image|>",
        images_first=False,
        tokens={"image_token": "<|image|>"},
    ),
    "blip2": Family(
        architecture="Blip2ForConditionalGeneration",
        model_type="blip-2",
        processor="Blip2Processor",
        image_processor="BlipImageProcessor",
        prefixes=PREFIXES["blip2"],
        towers=("eva",),
        languages=blip.LANGUAGES,
        projector="blip2",
        template="blip2",
        read=blip.read,
        write=blip.write,
        vision={"feature_layer": -1, "keep_class_token": True},
        layout=blip.LAYOUT,
        projection={"kind": "qformer"},
        projection_free=blip.FREE,
        image_text="",
    ),
}
"""By ModelConfig.family."""

REMOTE = {"InternVLChatModel": "internvl"}
"""Architectures of other people's code that are read: the family that they become."""


def family_of(architecture: str) -> str | None:
    """The family's name; None for a part alone or a stranger."""
    return next((name for name, family in FAMILIES.items() if family.architecture == architecture), None)
