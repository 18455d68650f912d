"""Towers and decoders that stand alone: classes of Hugging Face's that are one part of ours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.spelling import DECODER, Prefix, Prefixes


@dataclass(frozen=True, kw_only=True)
class Alone:
    """A class of Hugging Face's that is one part of ours."""

    part: str
    kind: str
    """Name in names.towers.TOWERS or configs.languages.FORMS."""
    prefixes: Prefixes
    left_out: str | None = None
    """Pattern of what a folder holds beside the part (CLIP's text tower)."""
    section: str | None = None
    """Where config.json has the part's own fields."""


def _tower(*starts: str) -> Prefixes:
    return (Prefix(part="vision", alone="", spelled=starts),)


_TEXT_TOWER = r"(text_model|text_projection|visual_projection)\.|logit_scale$|logit_bias$"
# transformers 5 writes the towers without any prefix
_TWO_TOWERS = _tower("vision_model.", "", "vision_model.vision_model.")
_AIMV2 = (
    Prefix(
        part="vision",
        alone="embeddings.patch_embedding.",
        spelled=("embeddings.patch_embed.", "vision_model.embeddings.patch_embed."),
    ),
    *_tower("", "vision_model."),
)

ALONE: dict[str, Alone] = {
    "CLIPVisionModel": Alone(part="vision", kind="clip", prefixes=_TWO_TOWERS),
    "CLIPVisionModelWithProjection": Alone(
        part="vision", kind="clip", prefixes=_TWO_TOWERS, left_out=r"visual_projection\."
    ),
    "CLIPModel": Alone(part="vision", kind="clip", prefixes=_TWO_TOWERS, left_out=_TEXT_TOWER, section="vision_config"),
    "SiglipVisionModel": Alone(part="vision", kind="siglip", prefixes=_TWO_TOWERS),
    "SiglipModel": Alone(
        part="vision", kind="siglip", prefixes=_TWO_TOWERS, left_out=_TEXT_TOWER, section="vision_config"
    ),
    "InternVLVisionModel": Alone(part="vision", kind="internvit", prefixes=_tower("")),
    "Aimv2VisionModel": Alone(part="vision", kind="aimv2", prefixes=_AIMV2),
    "Aimv2Model": Alone(part="vision", kind="aimv2", prefixes=_AIMV2, left_out=_TEXT_TOWER, section="vision_config"),
    "LlamaForCausalLM": Alone(part="language", kind="llama", prefixes=DECODER),
    "MistralForCausalLM": Alone(part="language", kind="mistral", prefixes=DECODER),
    "Qwen2ForCausalLM": Alone(part="language", kind="qwen2", prefixes=DECODER),
    "Qwen3ForCausalLM": Alone(part="language", kind="qwen3", prefixes=DECODER),
    "MixtralForCausalLM": Alone(part="language", kind="mixtral", prefixes=DECODER),
    "Qwen2MoeForCausalLM": Alone(part="language", kind="qwen2_moe", prefixes=DECODER),
    "Qwen3MoeForCausalLM": Alone(part="language", kind="qwen3_moe", prefixes=DECODER),
    "Gemma3ForCausalLM": Alone(part="language", kind="gemma3", prefixes=DECODER),
}
"""By architecture. The first of each kind is the one that is written."""

MODEL_TYPES: dict[str, str] = {
    **{family.model_type: family.architecture for family in FAMILIES.values()},
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "internvl_vision": "InternVLVisionModel",
    "aimv2": "Aimv2Model",
    "aimv2_vision_model": "Aimv2VisionModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""For a config.json that names no architecture."""


def left_out(alone: Alone, key: str) -> bool:
    return alone.left_out is not None and re.match(alone.left_out, key) is not None
