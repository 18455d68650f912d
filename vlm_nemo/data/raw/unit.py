"""What every raw format shares: units, raw samples, and the few things that are done with any image file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vlm_nemo.data.header import read_header
from vlm_nemo.data.sample import BAD_JSON, MISSING_IMAGE, Message, SampleError, ShardImage, check_text, printable

LONGEST_FACT = 2048
"""Letters: an address is a fact, a document is not."""


class RawSample(NamedTuple):
    """A raw sample that can be used."""

    name: str
    messages: list[Message]
    kind: str | None
    images: list[ShardImage]
    facts: dict[str, float | str] = {}
    """What the raw data says about it: similarity, language, url, … Names in lower case. Never changed in place."""


class RawDrop(NamedTuple):
    """A raw sample that cannot."""

    name: str
    reason: str
    detail: str


class Unit(Protocol):
    """The raw samples of one shard: plain data, so that any process can convert it."""

    @property
    def count(self) -> int: ...

    def fingerprint(self) -> str:
        """Equal as long as the raw files are."""
        ...

    def read(self) -> Iterator[RawSample | RawDrop]: ...


Map = Callable[[Callable[[Path], int], list[Path]], Iterator[int]]
"""`map`, or a pool's."""


_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a row of a form that nobody thought of raises: its own fault, never the whole run's. UserError and OSError are
not among them: a damaged file and a full disk are no fault of a row."""


def attempt(name: str, make: Callable[[str], RawSample]) -> RawSample | RawDrop:
    """make(name), or why it cannot be used; name: of the sample, as the raw data says it."""
    name = printable(name)
    try:
        sample = make(name)
        check_text(*(message["content"] for message in sample.messages), sample.kind or "")
        check_text(*sample.facts, *(value for value in sample.facts.values() if isinstance(value, str)))
        return sample
    except SampleError as error:
        return RawDrop(name, error.reason, printable(error.detail))
    except _FAULTS as error:
        return RawDrop(name, BAD_JSON, printable(f"{type(error).__name__}: {error}"))


def read_image(folder: Path, name: str) -> bytes:
    """A file of a folder of images. Raises SampleError ("missing image"), also if it lies outside."""
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root):
            return path.read_bytes()
    except OSError as error:
        raise SampleError(MISSING_IMAGE, f"{name}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise SampleError(MISSING_IMAGE, f"{name!r}: {error}") from None
    raise SampleError(MISSING_IMAGE, f"{name} lies outside the image folder")


def shard_image(data: bytes) -> ShardImage:
    """An image to be written. Raises SampleError ("broken image", "image size")."""
    header = read_header(data)
    return ShardImage(data, header.extension, header.width, header.height)


def facts_of(values: Mapping[Any, Any], without: Container[str] = ()) -> dict[str, float | str]:
    """Numbers and short texts of a table of facts, by name in lower case; yes and no are 1 and 0."""
    facts: dict[str, float | str] = {}
    for name, value in values.items():
        key = str(name).lower()
        if key in without or len(key) > LONGEST_FACT:
            continue
        if isinstance(value, (bool, int, float)):
            try:
                number = float(value)
            except OverflowError:  # JSON's integers have no end
                continue
            if math.isfinite(number):
                facts[key] = number
        elif isinstance(value, str) and len(value) <= LONGEST_FACT:
            facts[key] = value
    return facts


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file: another one has another."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def digest(*parts: Any) -> str:
    """SHA-256 of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
