"""Documents in which texts and images take turns (OBELICS, and what is made like it).

A row has two lists of equal length: `images` (a path or an address, or nothing) and `texts` (a text, or nothing); at
each place at most one of them is there. A document becomes one answer that nobody asked for: its texts and an `<image>`
for each image, in their order, each on lines of its own. Every token is supervised but the images' placeholders; with
the template "plain" nothing is put around it.

Images lie in a folder, or in img2dataset's output, found there by their address.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw.downloaded import Location, find_downloads, read_download
from vlm_nemo.data.raw.messages import text_messages
from vlm_nemo.data.raw.table import Rows, list_rows
from vlm_nemo.data.raw.unit import Map, RawDrop, RawSample, attempt, digest, facts_of, read_image, shard_image, stamp
from vlm_nemo.data.sample import BAD_JSON, BROKEN_IMAGE, IMAGE_SIZE, MISSING_IMAGE, SampleError, ShardImage
from vlm_nemo.data.turns import check_images, check_turns
from vlm_nemo.types import IMAGE_MARKER, UserError

LOST = ("drop", "skip")
"""lost: what becomes of a document of which an image cannot be had: it is dropped, or the image is left out."""


@dataclass(frozen=True, kw_only=True)
class DocumentUnit:
    """A piece of a table of documents."""

    rows: Rows
    folder: str | None
    """Folder of the images; None: they were downloaded."""
    found: dict[str, Location]
    """Where the downloaded images of these documents lie, by address."""
    lost: str

    @property
    def count(self) -> int:
        return self.rows.count

    def fingerprint(self) -> str:
        if self.folder is None:
            shards = sorted({location.shard for location in self.found.values()})
            where: list[Any] = [sorted(self.found.items()), [stamp(Path(shard)) for shard in shards]]
        else:
            where = [stamp(Path(self.folder) / name) for row in self.rows.read(["images"]) for name in _names(row)]
        return digest("interleaved", self.rows.parts(), self.lost, where)

    def read(self) -> Iterator[RawSample | RawDrop]:
        for number, row in enumerate(self.rows.read()):
            yield attempt(self.rows.name(number), partial(self._document, row=row))

    def _document(self, name: str, row: Any) -> RawSample:
        parts: list[str] = []
        images: list[ShardImage] = []
        lost: list[SampleError] = []
        for image, text in _places(row):
            if image is None:
                parts.append(text)
                continue
            try:
                images.append(shard_image(self._image(image)))
                parts.append(IMAGE_MARKER)
            except SampleError as error:
                if self.lost == "drop" or error.reason not in (MISSING_IMAGE, BROKEN_IMAGE, IMAGE_SIZE):
                    raise
                lost.append(error)
        if lost and not images:
            raise SampleError(lost[0].reason, f"none of {len(lost)} images can be used; the first: {lost[0].detail}")
        messages = text_messages("\n".join(parts))
        check_images(messages, len(images))
        check_turns(messages)
        facts = facts_of(_metadata(row) | row, ("images", "texts", "metadata", "general_metadata"))
        facts |= {"images_lost": float(len(lost))} if lost else {}
        return RawSample(name, messages, None, images, facts)

    def _image(self, name: str) -> bytes:
        if self.folder is not None:
            return read_image(Path(self.folder), name)
        if name not in self.found:
            raise SampleError(MISSING_IMAGE, f"{name} was not downloaded")
        return read_download(self.found[name])


def list_documents(
    where: dict[str, Path], options: dict[str, str], shard_samples: int, apply: Map
) -> list[DocumentUnit]:
    """Units of a table of documents. Raises UserError if it, or what was downloaded, cannot be read."""
    del apply
    lost = options.get("lost", LOST[0])
    if lost not in LOST:
        raise UserError(f"lost={lost} is unknown; choose one of {', '.join(LOST)}")
    if "images" in where and "downloaded" in where:
        raise UserError("give images (a folder) or downloaded (img2dataset's output), not both")
    path = where["path"]
    pieces = list_rows(path, shard_samples)
    if "downloaded" not in where:
        folder = str(where.get("images", path if path.is_dir() else path.parent))
        return [DocumentUnit(rows=rows, folder=folder, found={}, lost=lost) for rows in pieces]
    every = find_downloads(where["downloaded"])
    units = []
    for rows in pieces:  # a unit takes along the places of its own images only
        names = {name for row in rows.read(["images"]) for name in _names(row)}
        found = {name: every[name] for name in names if name in every}
        units.append(DocumentUnit(rows=rows, folder=None, found=found, lost=lost))
    return units


def _names(row: Any) -> list[str]:
    images = row.get("images") if isinstance(row, dict) else None
    return [image for image in images if isinstance(image, str) and image] if isinstance(images, list) else []


def _places(row: Any) -> Iterator[tuple[str | None, str]]:
    """(image or None, text) at each place that holds something. Raises SampleError ("bad json")."""
    images, texts = (row.get("images"), row.get("texts")) if isinstance(row, dict) else (None, None)
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise SampleError(BAD_JSON, "not a row with images and texts, two lists of equal length")
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if not all(value is None or isinstance(value, str) for value in (image, text)):
            raise SampleError(BAD_JSON, f"place {place} holds neither a text nor nothing")
        if image and text:
            raise SampleError(BAD_JSON, f"place {place} has an image and a text: which comes first?")
        if image:
            yield image, ""
        elif text and text.strip():
            yield None, text.strip()


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    """OBELICS says where a document is from in general_metadata, as JSON in a text."""
    try:
        content = json.loads(row.get("general_metadata") or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
