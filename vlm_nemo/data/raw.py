"""Read raw data sets as they come: img2dataset's tars, LLaVA's JSON with a folder of images.

A source is cut into units, one a shard to be written. A unit is plain data, so that any process can convert it; its
`fingerprint` changes when what it was made from changes. To add a kind: a unit class, a function that lists units,
an entry in KINDS.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vlm_nemo.data.chat import check_images, check_turns
from vlm_nemo.data.header import read_header
from vlm_nemo.data.sample import BAD_JSON, EMPTY_CAPTION, MISSING_IMAGE, Message, SampleError
from vlm_nemo.data.write import ShardImage
from vlm_nemo.types import IMAGE_MARKER, UserError

_IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RawSample(NamedTuple):
    """A raw sample that can be used."""

    name: str
    messages: list[Message]
    kind: str | None
    images: list[ShardImage]


class RawDrop(NamedTuple):
    """A raw sample that cannot."""

    name: str
    reason: str
    detail: str


class Unit(Protocol):
    """The raw samples of one shard."""

    @property
    def count(self) -> int: ...

    def fingerprint(self) -> str:
        """Equal as long as the raw files are."""
        ...

    def read(self) -> Iterator[RawSample | RawDrop]: ...


@dataclass(frozen=True, kw_only=True)
class TarUnit:
    """Samples `first` to `first + count` of a tar that img2dataset wrote."""

    tar: str
    first: int
    count: int

    def fingerprint(self) -> str:
        return _digest("img2dataset", Path(self.tar).name, _stamp(Path(self.tar)), self.first, self.count)

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


@dataclass(frozen=True, kw_only=True)
class LlavaUnit:
    """Rows of a LLaVA file; a row that could not be parsed is its text."""

    rows: list[Any]
    first: int
    images: str
    """Folder of the images."""

    @property
    def count(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        stamps = [_stamp(Path(self.images) / name) for row in self.rows for name in _image_names(row) or ()]
        return _digest("llava", self.first, self.rows, stamps)

    def read(self) -> Iterator[RawSample | RawDrop]:
        for number, row in enumerate(self.rows, self.first):
            name = f"row {number}"
            if isinstance(row, dict) and "id" in row:
                name += f" (id {row['id']})"
            try:
                yield _conversation(name, row, Path(self.images))
            except SampleError as error:
                yield RawDrop(name, error.reason, error.detail)


def scan_tar(tar: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset, size)}) of each sample. Raises UserError if the tar ends early or is damaged.

    The usual readers stop without a word at a damaged header or at a cut between two members.
    """
    return _scan_tar(tar, _stamp(tar))


@lru_cache(maxsize=2)
def _scan_tar(tar: Path, stamp: tuple[int, int]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Units of one tar come one after the other: it is scanned once for all of them."""
    del stamp
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = folder + slash + stem
                if not groups or groups[-1][0] != key:
                    groups.append((key, {}))
                groups[-1][1][extension.lower()] = (member.offset_data, member.size)
            end = archive.offset
        with open(tar, "rb") as stream:
            stream.seek(end)  # a whole tar ends with blocks of zeros
            whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tar} cannot be read as a tar: {error}; fetch it again or move it away") from None
    if not whole:
        raise UserError(f"{tar} is damaged or cut after {len(groups)} samples; fetch it again or move it away")
    return groups


def count_tar(tar: Path) -> int:
    """Number of samples in a tar."""
    return len(scan_tar(tar))


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
    return RawSample(name, messages, None, [_shard_image(image)])


def _conversation(name: str, row: Any, folder: Path) -> RawSample:
    """A row of a LLaVA file."""
    names = _image_names(row)
    turns = row.get("conversations") if isinstance(row, dict) else None
    if names is None or not isinstance(turns, list):
        raise SampleError(BAD_JSON, "not an object with conversations (a list) and image (text or a list of texts)")
    messages: list[Message] = []
    for turn in turns:
        speaker = _SPEAKERS.get(turn.get("from", "")) if isinstance(turn, dict) else None
        if speaker is None or not isinstance(turn.get("value"), str):
            raise SampleError(BAD_JSON, 'a turn is not {"from": human or gpt, "value": text}')
        messages.append({"role": speaker, "content": turn["value"]})
    check_images(messages, len(names))
    check_turns(messages)
    images = []
    root = folder.resolve()
    for image_name in names:
        path = (root / image_name).resolve()
        if not path.is_relative_to(root):
            raise SampleError(MISSING_IMAGE, f"{image_name} lies outside the image folder")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SampleError(MISSING_IMAGE, f"{image_name}: {error.strerror}") from None
        images.append(_shard_image(data))
    kind = row.get("kind")
    return RawSample(name, messages, None if kind is None else str(kind), images)


def _image_names(row: Any) -> list[str] | None:
    """Names of a row's images; None if they are not text."""
    names = row.get("image") if isinstance(row, dict) else None
    if names is None:
        return []
    names = names if isinstance(names, list) else [names]
    return names if all(isinstance(name, str) for name in names) else None


def _shard_image(data: bytes) -> ShardImage:
    header = read_header(data)
    return ShardImage(data, header.extension, header.width, header.height)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


Map = Callable[[Callable[[Path], int], list[Path]], Iterator[int]]
"""`map`, or a pool's."""


def list_tars(where: dict[str, Path], shard_samples: int, apply: Map) -> list[TarUnit]:
    """Units of img2dataset's output folder. Raises UserError if it holds no tars."""
    folder = where["path"]
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder} holds no .tar files; run img2dataset first or correct `path` in the manifest")
    units = []
    for tar, samples in zip(tars, apply(count_tar, tars), strict=True):
        for first in range(0, samples, shard_samples):
            units.append(TarUnit(tar=str(tar), first=first, count=min(shard_samples, samples - first)))
    return units


def list_llava(where: dict[str, Path], shard_samples: int, apply: Map) -> list[LlavaUnit]:
    """Units of a LLaVA file: a JSON list, or JSON lines. Raises UserError if the file cannot be read at all."""
    del apply
    path = where["json"]
    try:
        text = path.read_text(encoding="utf-8")
        rows = [_parse(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        if rows is None:
            rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}, not a list of conversations")
    return [
        LlavaUnit(rows=rows[first : first + shard_samples], first=first, images=str(where["images"]))
        for first in range(0, len(rows), shard_samples)
    ]


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


KINDS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Path], int, Map], list[Any]]]] = {
    "img2dataset": (("path",), list_tars),
    "llava": (("json", "images"), list_llava),
}
"""kind in manifest.yaml -> (its paths, what lists its units)."""
