"""The model card: what a folder holds, where it comes from, how to load it. Nothing that was not measured or read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.weights.configs.languages import FORMS as LANGUAGES
from vlm_nemo.weights.configs.languages import fitting_language
from vlm_nemo.weights.configs.towers import FORMS, fitting_tower
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.tables import naming_of, naming_of_part

ASPECTS = {
    "pad": "padded to a square with the mean colour, then resized",
    "crop": "the short side resized, the middle cut out",
    "squash": "both sides resized",
}
LAYOUTS = {
    "square": "squares of {size} pixels, {aspect}",
    "anyres": "tiles of {size} pixels on the best of {pinpoints} resolutions, unpadded, and the whole image",
    "tiles": "{min_tiles} to {max_tiles} tiles of {size} pixels and the whole image",
    "canvas": "up to {max_tiles} tiles of {size} pixels on one canvas",
    "ovis": "{min_tiles} to {max_tiles} tiles of {size} pixels and the whole image",
    "rows": "rows of tiles of {size} pixels (the longer edge resized to {longest_edge}), and the whole image",
    "native": "their own shape, {min_pixels} to {max_pixels} pixels",
}

LOAD = {
    None: """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
turn = {"role": "user", "content": [{"type": "image", "image": Image.open("picture.jpg")},
                                    {"type": "text", "text": "What is this?"}]}
inputs = processor.apply_chat_template(
    [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))""",
    "vision": """\
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(FOLDER)
processor = AutoImageProcessor.from_pretrained(FOLDER)""",
    "language": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
}


def model_card(
    cfg: ModelConfig,
    written: Mapping[str, Tensor],
    config: Mapping[str, Any],
    template: str,
    *,
    part: str | None,
    source: str,
    kept: bool,
) -> str:
    """README.md of an exported folder.

    cfg: as it was written. written: the tensors, for their sizes. config: config.json. kept: whether the checkpoint
    held tensors that its training did not touch.
    """
    tag = {None: "image-text-to-text", "vision": "image-feature-extraction", "language": "text-generation"}[part]
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {tag}",
        "---",
        "",
        f"# {config['architectures'][0]}",
        "",
    ]
    lines += [
        f"Written by `vlm-nemo convert` from the checkpoint `{source}`, which changes names and layout only. It",
        "knows neither how good the model is nor under which licence the data and the weights it began with came: ask",
        "whoever trained it.",
        "",
    ]
    lines += ["| part | made of | numbers |", "|---|---|---|"]
    total = 0
    naming = naming_of(cfg) if part is None else naming_of_part(cfg, part)[1]
    for name, words in _rows(cfg, part).items():
        count = sum(t.numel() for key, t in written.items() if (naming.understood(key) or ("",))[0] == name)
        total += count
        lines.append(f"| {name} | {words} | {count:,} |")
    lines += [f"| together | stored as {config['torch_dtype']} | {total:,} |", ""]
    if part != "language":
        lines += _pixels(cfg, part, kept, written)
    if part != "vision":
        lines += _words(cfg, template)
    return "\n".join([*lines, "## Loading", "", "```python", LOAD[part], "```", ""])


def _rows(cfg: ModelConfig, part: str | None) -> dict[str, str]:
    """part -> what it is"""
    v, lang = cfg.vision, cfg.language
    places = f"{v.image_size} pixels in patches of {v.patch_size}"
    if v.position == "rope":
        places = f"images of any shape in patches of {v.patch_size}"
    vision = f"{_tower(cfg, part)}, {v.num_layers} layers of {v.hidden_size}, {places}"
    language = (
        f"{_decoder(cfg, part)}, {lang.num_layers} layers of {lang.hidden_size}, {lang.num_heads} heads "
        f"({lang.num_kv_heads} for keys), {lang.vocab_size} tokens"
    )
    if part == "vision":
        return {"vision": vision}
    if part == "language":
        return {"language": language}
    return {"vision": vision, "projector": _projector(cfg), "language": language}


def _tower(cfg: ModelConfig, part: str | None) -> str:
    kinds = FAMILIES[cfg.family].towers if part is None else list(FORMS)
    return NAMES[fitting_tower(cfg.vision, kinds)[0]]


def _decoder(cfg: ModelConfig, part: str | None) -> str:
    kinds = FAMILIES[cfg.family].languages if part is None else list(LANGUAGES)
    return NAMES[fitting_language(cfg.language, kinds)[0]]


NAMES = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "internvit": "InternViT",
    "aimv2": "AIMv2",
    "qwen2_vl": "Qwen2-VL's",
    "qwen2_5_vl": "Qwen2.5-VL's",
    "eva": "EVA",
    "mllama": "Llama 3.2 Vision's",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "gemma3": "Gemma 3",
}


def _projector(cfg: ModelConfig) -> str:
    p, r = cfg.projector, cfg.reduce
    kinds = {
        "mlp": "one linear layer" if p.num_layers == 1 else f"{p.num_layers} layers, {p.activation}",
        "qformer": f"a Q-Former of {p.num_queries} queries, {p.num_layers} layers",
        "perceiver": f"a Perceiver of {p.num_queries} queries, {p.num_layers} layers",
        "visual_vocabulary": f"{p.vocabulary} visual words",
        "cross_attention": "cross-attention in the decoder",
    }
    reduced = "" if r.kind == "none" else f"{r.kind.replace('_', ' ')} of {r.factor} x {r.factor}, "
    return reduced + kinds[p.kind]


def _pixels(cfg: ModelConfig, part: str | None, kept: bool, written: Mapping[str, Tensor]) -> list[str]:
    v, layout = cfg.vision, cfg.layout
    how = LAYOUTS[layout.kind].format(
        **{**asdict(layout), "pinpoints": len(layout.pinpoints), "aspect": ASPECTS[layout.aspect], "size": v.image_size}
    )
    token = f", {'with' if v.keep_class_token else 'without'} the class token" if v.class_token else ""
    lines = [
        "## Images",
        "",
        f"Trained on {how}; mean {v.mean}, deviation {v.std}. The files of the processor here do the same, within two",
        f"levels of 255 a pixel. The features are hidden state {v.feature_layer}{token}.",
        "",
    ]
    if kept:
        lines += [
            "Tensors that these features do not pass through are as they were imported, untouched by training.",
            "",
        ]
    elif made := _stood_in(cfg, part, written):
        lines += [
            f"`{made}` is a stand-in (ones and zeros): this tower was trained without, and only outputs that this",
            "model does not use would pass through it.",
            "",
        ]
    return lines


def _stood_in(cfg: ModelConfig, part: str | None, written: Mapping[str, Tensor]) -> str | None:
    """The norm that was made up, if one was."""
    naming = naming_of(cfg) if part is None else naming_of_part(cfg, part)[1]
    table = naming.tables["vision"]
    if not table.stand_ins or not table.when_stood_in(cfg.vision):
        return None
    name = table.stand_ins[0].theirs
    return name.rpartition(".")[0] if naming.spelled("vision", name) in written else None


def _words(cfg: ModelConfig, template: str) -> list[str]:
    t = TEMPLATES[template]
    system = f"{t.system_start}{t.system}{t.system_end}" if t.system else ""
    shown = f"{system}{t.user_start}QUESTION{t.user_end}{t.assistant_start}{t.assistant_lead}ANSWER{t.assistant_end}"
    return [
        "## Conversation",
        "",
        f"Template `{template}`, also in `chat_template.jinja`; between the tokens of beginning and end:",
        "",
        "```text",
        shown,
        "```",
        "",
        f"At most {cfg.language.max_positions} tokens, an image's placeholders included.",
        "",
    ]
