"""The language's files: a tokenizer that has the tokens we need, and our template as a chat template of jinja."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vlm_nemo.data.chat import TEMPLATES, Template
from vlm_nemo.data.tokenizer import KEPT, NEEDED, Tokenizer
from vlm_nemo.types import IMAGE_MARKER, UserError
from vlm_nemo.weights.hf import read_json

CHAT_TEMPLATE = "chat_template.jinja"
PAD = "<pad>"
ROWS = 64
"""An embedding grows to a multiple of this."""


def import_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a folder's tokenizer and add what it lacks of `<image>` and `<pad>`; returns the tokens added.

    Raises UserError if there is no fast tokenizer.
    """
    for name in NEEDED:
        if not (source / name).is_file():
            raise UserError(
                f"{source} has no {name}; save the language model's fast tokenizer there "
                "(AutoTokenizer.from_pretrained(…).save_pretrained)"
            )
    target.mkdir(parents=True)
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    content, config = read_json(target / "tokenizer.json"), read_json(target / "tokenizer_config.json")
    tokens: list[dict[str, Any]] = content.setdefault("added_tokens", [])
    ids = {**content.get("model", {}).get("vocab", {})} if isinstance(content["model"].get("vocab"), dict) else {}
    ids.update((token["content"], token["id"]) for token in tokens)
    next_id = max([*ids.values(), len(content["model"].get("vocab", [])) - 1]) + 1
    added = []
    for role, name in (("image_token", IMAGE_MARKER), ("pad_token", PAD)):
        known = config.get(role)
        name = (known.get("content") if isinstance(known, dict) else known) or name
        if name not in {token["content"] for token in tokens}:
            if name in ids:
                raise UserError(f"{source}: {name!r} is an ordinary word of the tokenizer; make it a special token")
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            tokens.append({"id": next_id, "content": name, **flags})
            config.setdefault("added_tokens_decoder", {})[str(next_id)] = {"content": name, **flags}
            next_id += 1
            added.append(name)
        config[role] = name
    _write(target / "tokenizer.json", content)
    _write(target / "tokenizer_config.json", config)
    return added


def export_tokenizer(tokenizer: Tokenizer, target: Path, template: Template, processor: str | None) -> None:
    """The tokenizer's files with our chat template; processor: the class that AutoProcessor is to build, if any.

    Ours encodes what lies between two special tokens by itself, as LLaVA's training did, so that a SentencePiece-like
    tokenizer puts its "▁" before each such piece. The files are made to say so: some put it before the first only, and
    transformers 5 builds a LlamaTokenizer by rules of its own instead of reading tokenizer.json.
    """
    tokenizer.save(target)
    content, config = read_json(target / "tokenizer.json"), read_json(target / "tokenizer_config.json")
    if _prepend_always(content.get("pre_tokenizer")):
        _write(target / "tokenizer.json", content)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("chat_template", None)  # an earlier one would stand beside ours
    config.pop("processor_class", None)
    _write(target / "tokenizer_config.json", {**config, **({"processor_class": processor} if processor else {})})
    (target / CHAT_TEMPLATE).write_text(jinja(template), encoding="utf-8")


def _prepend_always(step: dict[str, Any] | None) -> bool:
    """Change a pre-tokenizer that marks the first piece of a text only; says whether it was one."""
    if step is None:
        return False
    if step.get("type") == "Sequence":
        return any([_prepend_always(inner) for inner in step["pretokenizers"]])
    if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "always"
        return True
    return False


def rows_needed(tokens: int, rows: int) -> int:
    """Rows of an embedding that has `rows` and shall hold `tokens`: as many, or the next multiple of 64."""
    return rows if tokens <= rows else -(-tokens // ROWS) * ROWS


def template_of(folder: Path) -> str | None:
    """The name of our template that a folder's chat template is, to the letter; None for anybody else's."""
    path = folder / CHAT_TEMPLATE
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    return next((name for name, template in TEMPLATES.items() if jinja(template) == text), None)


def jinja(template: Template) -> str:
    """A template in the language of Hugging Face's chat templates: the text that training saw, from bos to eos.

    Contents are text, or lists of {"type": "text" | "image"}: a turn's images come first, a line each, as LLaVA has
    them. `add_generation_prompt` ends where the assistant starts to speak.
    """
    system = (
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{{- text(messages[0]['content']) + " + _quoted(template.system_end) + " -}}{%- set turns = messages[1:] -%}"
        "{%- else -%}"
        "{{- " + _quoted(template.system + template.system_end if template.system else "") + " -}}"
        "{%- set turns = messages -%}{%- endif -%}"
    )
    return (
        "{%- macro text(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
        "{%- for item in content if item['type'] == 'image' -%}{{- "
        + _quoted(IMAGE_MARKER + "\n")
        + " -}}{%- endfor -%}"
        "{%- for item in content if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{{- bos_token -}}" + system + "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
        "{{- " + _quoted(template.user_start) + " + text(message['content']) + " + _quoted(template.user_end) + " -}}"
        "{%- else -%}"
        "{{- " + _quoted(template.assistant_start + template.assistant_lead) + " + text(message['content']) | trim"
        " + eos_token -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- " + _quoted(template.assistant_start) + " -}}{%- endif -%}"
    )


def _quoted(text: str) -> str:
    """A string literal of jinja."""
    return json.dumps(text)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
