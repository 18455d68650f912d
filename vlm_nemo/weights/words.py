"""The language's files: a tokenizer that has the tokens we need, and a chat template beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_nemo.data.chat import TEMPLATES, Template, end_id
from vlm_nemo.data.tokenizer import KEPT, NEEDED, Tokenizer
from vlm_nemo.types import IMAGE_MARKER, UserError
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.hf_folder import read_json
from vlm_nemo.weights.jinja import jinja

CHAT_TEMPLATE = "chat_template.jinja"
PAD = "<pad>"
ROWS = 64
"""An embedding grows to a multiple of this."""


def import_tokenizer(source: Path, target: Path, image_id: int | None = None) -> list[str]:
    """Copy a folder's tokenizer and add what it lacks of `<image>` and `<pad>`; returns the tokens added.

    image_id: the placeholder that config.json names; None = the one that the tokenizer names.
    Raises UserError if there is no fast tokenizer, or no special token of that id.
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
    if image_id is not None:
        config["image_token"] = _placeholder(source, tokens, image_id)
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


def _placeholder(source: Path, tokens: list[dict[str, Any]], image_id: int) -> str:
    """The name of the special token of that id."""
    for token in tokens:
        if token["id"] == image_id:
            return str(token["content"])
    raise UserError(
        f"{source}/config.json: the image token is {image_id}, but tokenizer.json has no added token of that id; they "
        "must be of one model"
    )


def export_tokenizer(tokenizer: Tokenizer, target: Path, template: Template, family: str | None) -> None:
    """The tokenizer's files with our chat template; family: whose processor AutoProcessor is to build, if any's.

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
    if family is not None:
        config["processor_class"] = FAMILIES[family].processor
        config |= {"extra_special_tokens": roles} if (roles := _roles(FAMILIES[family].tokens, content)) else {}
    _write(target / "tokenizer_config.json", config)
    text = jinja(template, *_marks(family)) if family is not None else jinja(template)
    (target / CHAT_TEMPLATE).write_text(text, encoding="utf-8")


def generation_config(tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    """generation_config.json: where answers end, by the template and by the tokenizer."""
    end = end_id(tokenizer, template)
    ends: int | list[int] = tokenizer.eos_id if end == tokenizer.eos_id else [end, tokenizer.eos_id]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}


def _roles(wanted: Mapping[str, str], content: Mapping[str, Any]) -> dict[str, str]:
    """Of the tokens that a family's processor asks for by role those that the tokenizer has."""
    known = {token["content"] for token in content.get("added_tokens") or []}
    return {role: name for role, name in wanted.items() if name in known}


def _marks(family: str) -> tuple[str, bool]:
    return FAMILIES[family].image_text, FAMILIES[family].images_first


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
    marks = dict.fromkeys(_marks(family) for family in FAMILIES)
    return next((name for name, t in TEMPLATES.items() for mark in marks if jinja(t, *mark) == text), None)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
