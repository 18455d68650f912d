"""The model card: what a folder holds, where it comes from, how to load it. Nothing that was not measured or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.model.config import ModelConfig

ASPECTS = {
    "pad": "padded to a square with the mean colour, then resized",
    "crop": "the short side resized, the middle cut out",
    "squash": "both sides resized",
}

LOAD = {
    None: """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
turn = {"role": "user", "content": [{"type": "image", "image": Image.open("picture.jpg")},
                                    {"type": "text", "text": "What is this?"}]}
inputs = processor.apply_chat_template(
    [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))""",
    "vision": """\
from transformers import AutoImageProcessor, CLIPVisionModel

model = CLIPVisionModel.from_pretrained(FOLDER)
processor = AutoImageProcessor.from_pretrained(FOLDER)""",
    "language": """\
from transformers import AutoTokenizer, LlamaForCausalLM

model = LlamaForCausalLM.from_pretrained(FOLDER)
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
    for name, (words, prefixes) in _rows(cfg, part).items():
        count = sum(t.numel() for key, t in written.items() if key.startswith(prefixes))
        total += count
        lines.append(f"| {name} | {words} | {count:,} |")
    lines += [f"| together | stored as {config['torch_dtype']} | {total:,} |", ""]
    if part != "language":
        lines += _pixels(cfg, kept, written)
    if part != "vision":
        lines += _words(cfg, template)
    return "\n".join([*lines, "## Loading", "", "```python", LOAD[part], "```", ""])


def _rows(cfg: ModelConfig, part: str | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    v, lang = cfg.vision, cfg.language
    vision = f"CLIP, {v.num_layers} layers of {v.hidden_size}, {v.image_size} pixels in patches of {v.patch_size}"
    language = (
        f"Llama, {lang.num_layers} layers of {lang.hidden_size}, {lang.num_heads} heads ({lang.num_kv_heads} for "
        f"keys), {lang.vocab_size} tokens"
    )
    if part == "vision":
        return {"vision": (vision, ("",))}
    if part == "language":
        return {"language": (language, ("",))}
    return {
        "vision": (vision, ("vision_tower.",)),
        "projector": (f"two layers, {cfg.projector.activation}", ("multi_modal_projector.",)),
        "language": (language, ("language_model.",)),
    }


def _pixels(cfg: ModelConfig, kept: bool, written: Mapping[str, Tensor]) -> list[str]:
    v = cfg.vision
    lines = [
        "## Images",
        "",
        f"Trained on squares of {v.image_size} pixels, {ASPECTS[v.aspect]}; mean {v.mean}, deviation {v.std}. The",
        "files of the processor here do the same, within two levels of 255 a pixel. The features are hidden state",
        f"{v.feature_layer}, {'with' if v.keep_class_token else 'without'} the class token.",
        "",
    ]
    if kept:
        lines += [
            "Tensors that these features do not pass through are as they were imported, untouched by training.",
            "",
        ]
    elif any(name.endswith(POST_NORM.rpartition(".")[2] + ".weight") for name in written):
        lines += [
            "`post_layernorm` is a stand-in (ones and zeros): this tower was trained without, and only the pooled",
            "output of CLIP's class would use it.",
            "",
        ]
    return lines


def _words(cfg: ModelConfig, template: str) -> list[str]:
    t = TEMPLATES[template]
    shown = f"{t.system}{t.system_end}{t.user_start}QUESTION{t.user_end}{t.assistant_start}{t.assistant_lead}ANSWER"
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
