"""Tokenizers of a few hundred tokens, with the special tokens that a family has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.data.tokenizer import Tokenizer

TEXTS = ["user\nWhat is it?\n\nassistant\nA red circle, I think.\n"] * 20


def make_tokenizer(
    folder: Path, names: Sequence[str], *, image: str = "<image>", bos: str | None = "<s>", vocab: int = 300
) -> Tokenizer:
    """A BPE with these names as special tokens too; bos=None: one without bos."""
    train_tokenizer(TEXTS, vocab, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    known = {token["content"] for token in content["added_tokens"]}
    for name in dict.fromkeys([*names, image, bos]):
        if name and name not in known:
            at = max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            content["added_tokens"].append({"id": at, "content": name, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"image_token": image, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)
