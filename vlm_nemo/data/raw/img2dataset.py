"""img2dataset's output: tars of an image, its caption and what is known about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_nemo.data.chat import check_images
from vlm_nemo.data.raw.tar import count_tar, scan_tar
from vlm_nemo.data.raw.unit import Map, RawDrop, RawSample, digest, shard_image, stamp
from vlm_nemo.data.sample import BAD_JSON, EMPTY_CAPTION, MISSING_IMAGE, Message, SampleError
from vlm_nemo.types import IMAGE_MARKER, UserError

_IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif")


@dataclass(frozen=True, kw_only=True)
class TarUnit:
    """Samples `first` to `first + count` of a tar that img2dataset wrote."""

    tar: str
    first: int
    count: int

    def fingerprint(self) -> str:
        return digest("img2dataset", Path(self.tar).name, stamp(Path(self.tar)), self.first, self.count)

    def read(self) -> Iterator[RawSample | RawDrop]:
        groups = scan_tar(Path(self.tar))[self.first : self.first + self.count]
        with open(self.tar, "rb") as stream:
            for key, members in groups:
                name = f"{Path(self.tar).name}/{key}"
                contents = {}
                for extension, (offset, size) in members.items():
                    stream.seek(offset)
                    contents[extension] = stream.read(size)
                try:
                    yield _caption(name, contents)
                except SampleError as error:
                    yield RawDrop(name, error.reason, error.detail)


def _caption(name: str, contents: dict[str, bytes]) -> RawSample:
    """An image-text pair of img2dataset: the user shows the image, the assistant says the caption."""
    try:
        facts = json.loads(contents.get("json", b"{}"))
        text = contents["txt"].decode("utf-8") if "txt" in contents else facts.get("caption")
    except (ValueError, AttributeError) as error:
        raise SampleError(BAD_JSON, str(error)) from None
    if not isinstance(text, str) or not text.strip():
        raise SampleError(EMPTY_CAPTION, "no caption")
    image = next((contents[extension] for extension in _IMAGE_MEMBERS if extension in contents), None)
    if image is None:
        raise SampleError(MISSING_IMAGE, f"members: {', '.join(contents)}")
    messages: list[Message] = [
        {"role": "user", "content": IMAGE_MARKER},
        {"role": "assistant", "content": text.strip()},
    ]
    check_images(messages, 1)
    return RawSample(name, messages, None, [shard_image(image)])


def list_tars(where: dict[str, Path], options: dict[str, str], shard_samples: int, apply: Map) -> list[TarUnit]:
    """Units of img2dataset's output folder. Raises UserError if it holds no tars."""
    del options
    folder = where["path"]
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} holds no .tar files; run img2dataset first or correct `path` in the manifest")
    units = []
    for tar, samples in zip(tars, apply(count_tar, tars), strict=True):
        for first in range(0, samples, shard_samples):
            units.append(TarUnit(tar=str(tar), first=first, count=min(shard_samples, samples - first)))
    return units
