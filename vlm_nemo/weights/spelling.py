"""How families spell the names of tensors: the beginnings of keys in files, both ways.

"Hub names" are the keys of the files that a family is published with; other tools read these. transformers 5 writes
others (it leaves out `vision_model.`), and has others again in memory. Every spelling is read, the hub's is written.
Inside, a tensor goes by its part and the name that it has where that part stands alone (`weights.names`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The beginning of some names."""

    part: str
    """vision | projector | language"""
    alone: str
    """Where the part stands alone."""
    spelled: tuple[str, ...]
    """In files: the hub's first, it is the one that is written."""


Prefixes = tuple[Prefix, ...]
Name = tuple[str, str]
"""(part, name where the part stands alone)"""


def spelled(prefixes: Prefixes, part: str, name: str) -> str:
    """("vision", "embeddings.class_embedding") -> "vision_tower.vision_model.embeddings.class_embedding" """
    fitting = [p for p in prefixes if p.part == part and name.startswith(p.alone)]
    best = max(fitting, key=lambda p: len(p.alone))
    return best.spelled[0] + name.removeprefix(best.alone)


def understood(prefixes: Prefixes, key: str) -> Name | None:
    """The inverse, for every spelling; None for a key of no part."""
    fitting = [(s, p) for p in prefixes for s in p.spelled if key.startswith(s)]
    if not fitting:
        return None
    start, best = max(fitting, key=lambda pair: len(pair[0]))
    return best.part, best.alone + key.removeprefix(start)


def _language(*models: str, heads: tuple[str, ...]) -> Prefixes:
    return (
        Prefix(part="language", alone="model.", spelled=models),
        Prefix(part="language", alone="lm_head.", spelled=heads),
    )


DECODER = _language("model.", heads=("lm_head.",))
_UNDER_LLAVA = _language(
    "language_model.model.", "model.language_model.", heads=("language_model.lm_head.", "lm_head.")
)
_LLAVA_PROJECTOR = Prefix(
    part="projector", alone="", spelled=("multi_modal_projector.", "model.multi_modal_projector.")
)
_NEWLINE = Prefix(part="projector", alone="image_newline", spelled=("image_newline", "model.image_newline"))
_UNDER_VISION_MODEL = Prefix(
    part="vision",
    alone="",
    spelled=(
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
    ),
)

PREFIXES: dict[str, Prefixes] = {
    "llava": (_UNDER_VISION_MODEL, _LLAVA_PROJECTOR, *_UNDER_LLAVA),
    "llava_next": (_UNDER_VISION_MODEL, _LLAVA_PROJECTOR, _NEWLINE, *_UNDER_LLAVA),
    "internvl": (
        Prefix(part="vision", alone="", spelled=("vision_tower.", "model.vision_tower.")),
        _LLAVA_PROJECTOR,
        *_UNDER_LLAVA,
    ),
    "internvl_remote": (
        Prefix(part="vision", alone="", spelled=("vision_model.",)),
        Prefix(part="projector", alone="", spelled=("mlp1.",)),
        *_UNDER_LLAVA,
    ),
    "qwen2_vl": (
        Prefix(part="vision", alone="", spelled=("visual.", "model.visual.")),
        Prefix(part="projector", alone="", spelled=("visual.merger.", "model.visual.merger.")),
        *_language("model.", "model.language_model.", heads=("lm_head.",)),
    ),
    "ovis2": (
        Prefix(part="vision", alone="", spelled=("model.vision_tower.transformer.",)),
        Prefix(part="projector", alone="head_", spelled=("model.vision_tower.head_",)),
        Prefix(part="projector", alone="visual_embeddings_table.", spelled=("model.visual_embeddings_table.",)),
        *_language("model.language_model.", heads=("lm_head.",)),
    ),
    "idefics3": (
        Prefix(part="vision", alone="", spelled=("model.vision_model.",)),
        Prefix(part="projector", alone="", spelled=("model.connector.",)),
        *_language("model.text_model.", heads=("lm_head.",)),
    ),
    "mllama": (
        Prefix(part="vision", alone="", spelled=("vision_model.", "model.vision_model.")),
        _LLAVA_PROJECTOR,
        *_UNDER_LLAVA,
    ),
    "blip2": (
        Prefix(part="vision", alone="", spelled=("vision_model.",)),
        Prefix(part="projector", alone="query_tokens", spelled=("query_tokens",)),
        Prefix(part="projector", alone="qformer.", spelled=("qformer.",)),
        Prefix(part="projector", alone="language_projection.", spelled=("language_projection.",)),
        *_language("language_model.model.", heads=("language_model.lm_head.",)),
    ),
}
