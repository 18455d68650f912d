"""How many tokens each record's text takes, kept beside the shard, so that rows are planned without reading records.

    captions/00000.tar.lengths-3f9c01d2ab44.safetensors     int32 text_tokens [records]

The name holds a fingerprint of all that decides the ids: tokenizer, special tokens, template. A negative value -k says
that the record cannot be used with them, for REASONS[k - 1]. Images are not in it: what they take depends on the model
and follows from their sizes (layout/).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.chat import Template, encode_conversation
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.images import absent
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.sample import REASONS, Record, SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

COLUMN = "text_tokens"
_PLAIN = Template()
_FIRST = ("system", "system_end", "user_start", "user_end", "assistant_start", "assistant_lead")
_ENCODING = 1
"""Raise it when chat.py or tokenizer.py come to make other ids of the same text."""


def fingerprint(tokenizer: Tokenizer, template: Template, layout: LayoutConfig) -> str:
    """12 hex digits that change when an id could: with the tokenizer's file, its special tokens, the template, or the
    text that the layout puts around an image."""
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id]
    # What a template came to have later is left out where it says nothing: old lengths stay good
    words = {key: value for key, value in asdict(template).items() if key in _FIRST or value != asdict(_PLAIN)[key]}
    origin: dict[str, Any] = {"encoding": _ENCODING, "tokenizer": content, "special": special, "template": words}
    if layout.before or layout.after:
        origin["around"] = [layout.before, layout.after]
    text = json.dumps(origin, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def lengths_path(tar: Path, fingerprint: str) -> Path:
    """00000.tar -> 00000.tar.lengths-<fingerprint>.safetensors"""
    return tar.with_name(f"{tar.name}.lengths-{fingerprint}.safetensors")


def measure(
    records: Iterable[Record | SampleError], tokenizer: Tokenizer, template: Template, layout: LayoutConfig
) -> NDArray[np.int32]:
    """int32 [records]: tokens of each conversation without what stands for its images, or -k for REASONS[k - 1].

    A SampleError among the records is one that could not be read; its reason goes into the result.
    """
    image = absent(layout.before, layout.after)
    return np.array([_measure(record, tokenizer, template, image) for record in records], dtype=np.int32)


def _measure(record: Record | SampleError, tokenizer: Tokenizer, template: Template, image: ImagePlan) -> int:
    try:
        if isinstance(record, SampleError):
            raise record
        return len(encode_conversation(record.messages, tokenizer, template, [image] * len(record.sizes)).tokens)
    except SampleError as error:
        return -1 - REASONS.index(error.reason)


def write_lengths(path: Path, lengths: NDArray[np.int32]) -> None:
    """Write a sidecar, atomically."""
    from safetensors.numpy import save_file

    part = path.with_name(path.name + ".part")
    save_file({COLUMN: lengths.astype(np.int32, copy=False)}, part)
    os.replace(part, path)


def reason_of(length: int) -> str:
    """The reason that a negative length stands for. Raises UserError for one that this version does not know."""
    if not -len(REASONS) <= length < 0:
        raise UserError(
            f"a lengths file has {length}, which is no reason of this version; run `vlm-nemo prepare` again"
        )
    return REASONS[-length - 1]
