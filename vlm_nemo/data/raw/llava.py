"""LLaVA's files: a JSON list (or JSON lines) of conversations, and a folder of images.

`<image>` stays where it stands in a turn; a row without an image (no key, null or "") is text only. `captions: true`
leaves of each row the images and the answer, as LLaVA's first stage trains on LLaVA-Pretrain's 558K rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw.table import read_list
from vlm_nemo.data.raw.unit import Map, RawDrop, RawSample, attempt, digest, facts_of, read_image, shard_image, stamp
from vlm_nemo.data.sample import BAD_JSON, Message, SampleError
from vlm_nemo.data.turns import check_images, check_turns
from vlm_nemo.types import IMAGE_MARKER, UserError

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NOT_FACTS = ("id", "image", "conversations", "kind")


@dataclass(frozen=True, kw_only=True)
class LlavaUnit:
    """Rows of a LLaVA file; a row that could not be parsed is its text."""

    rows: list[Any]
    first: int
    images: str
    """Folder of the images."""
    captions: bool = False
    """Without the questions."""

    @property
    def count(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        stamps = [stamp(Path(self.images) / name) for row in self.rows for name in _image_names(row) or ()]
        return digest("llava", self.first, self.rows, stamps, self.captions)

    def read(self) -> Iterator[RawSample | RawDrop]:
        for number, row in enumerate(self.rows, self.first):
            name = f"row {number}"
            if isinstance(row, dict) and "id" in row:
                name += f" (id {row['id']})"
            yield attempt(name, partial(_conversation, row=row, folder=Path(self.images), captions=self.captions))


def _conversation(name: str, row: Any, folder: Path, captions: bool) -> RawSample:
    """A row of a LLaVA file."""
    names = _image_names(row)
    turns = row.get("conversations") if isinstance(row, dict) else None
    if names is None or not isinstance(turns, list):
        raise SampleError(BAD_JSON, "not an object with conversations (a list) and image (text or a list of texts)")
    messages: list[Message] = []
    for turn in turns:
        speaker = _SPEAKERS.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if speaker is None or not isinstance(turn.get("value"), str):
            raise SampleError(BAD_JSON, 'a turn is not {"from": human or gpt, "value": text}')
        messages.append({"role": speaker, "content": turn["value"]})
    check_images(messages, len(names))
    check_turns(messages)
    if captions:
        messages = _caption_only(messages, len(names))
        check_images(messages, len(names))
    images = [shard_image(read_image(folder, image)) for image in names]
    kind = row.get("kind")
    facts = {"folder": str(Path(names[0]).parent) if names else "no image"} | facts_of(row, _NOT_FACTS)
    return RawSample(name, messages, None if kind is None else str(kind), images, facts)


def _caption_only(messages: list[Message], images: int) -> list[Message]:
    if len(messages) != 2 or not images:
        raise SampleError(BAD_JSON, f"captions: true needs an image and two turns, not {images} and {len(messages)}")
    return [{"role": "user", "content": "\n".join([IMAGE_MARKER] * images)}, messages[1]]


def _image_names(row: Any) -> list[str] | None:
    """Names of a row's images; None if they are not text."""
    names = row.get("image") if isinstance(row, dict) else None
    if names is None or names == "":
        return []
    names = names if isinstance(names, list) else [names]
    return names if all(isinstance(name, str) for name in names) else None


def list_llava(where: dict[str, Path], options: dict[str, str], shard_samples: int, apply: Map) -> list[LlavaUnit]:
    """Units of a LLaVA file: a JSON list, or JSON lines. Raises UserError if the file cannot be read at all."""
    del apply
    captions = options.get("captions", "false").lower()
    if captions not in ("true", "false"):
        raise UserError(f"captions={captions} must be true or false")
    rows = read_list(where["json"])
    images = str(where["images"])
    return [
        LlavaUnit(rows=rows[first : first + shard_samples], first=first, images=images, captions=captions == "true")
        for first in range(0, len(rows), shard_samples)
    ]
