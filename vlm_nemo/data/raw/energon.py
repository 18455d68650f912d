"""WebDatasets that megatron-energon prepared: what their .nv-meta says, and how a sample's members become messages.

    .nv-meta/dataset.yaml   sample_type: {__class__: CaptioningSample}, field_map: {image: "jpg,png", caption: json[a]}
    .nv-meta/split.yaml     split_parts: {train: ["shard_{000..007}.tar"], val: […]}, exclude: [shard_003.tar/key]
    .nv-meta/.info.json     shard_counts: {shard_000.tar: 1000, …}           (.info.yaml in older versions)

Nothing of the folder is run: a dataset.yaml that names Python code (sample_loader) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vlm_nemo.data.raw.messages import caption_messages, pick_answer, question_messages, text_messages
from vlm_nemo.data.sample import BAD_JSON, MISSING_IMAGE, Message, SampleError
from vlm_nemo.types import UserError

META = ".nv-meta"
SAMPLE_TYPES = {
    "CaptioningSample": ("image", "caption"),
    "VQASample": ("image", "context", "answers"),
    "OCRSample": ("image", "text"),
    "TextSample": ("text",),
}
"""Sample types that are read, and the fields that each needs."""
_OPTIONAL = {"VQASample": ("answer_weights",)}
_OLD_NAMES = {name.replace("Sample", "Webdataset"): name for name in SAMPLE_TYPES}
"""dataset.yaml of energon before 3.0 named the dataset's class, not the sample's."""
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_GROUP = re.compile(r"\{([^{}]*)\}")

Field = tuple[tuple[str, ...], ...]
"""What may hold a field, in order of preference: "jpg,json[a][0]" -> (("jpg",), ("json", "a", "0"))."""


@dataclass(frozen=True, kw_only=True)
class EnergonMeta:
    """What .nv-meta says about one split."""

    tars: tuple[str, ...]
    """Relative to the folder, in the split's order."""
    counts: dict[str, int]
    """Samples of each tar when energon indexed it."""
    excluded: frozenset[str]
    """Samples to leave out: "shard.tar/key"."""
    sample_type: str
    """One of SAMPLE_TYPES"""
    field_map: dict[str, Field]

    @property
    def members(self) -> frozenset[str]:
        """Extensions of the members that are needed."""
        return frozenset(option[0] for field in self.field_map.values() for option in field)


def read_energon(
    folder: str | Path, split: str = "train", *, read: Callable[[str], bytes] | None = None
) -> EnergonMeta:
    """What .nv-meta of `folder` says.

    read: bytes of a file by its path in the folder (".nv-meta/split.yaml"), FileNotFoundError where there is none; by
        default from the local disk.
    Raises UserError if something is missing, does not fit together, or is of a type that is not read.
    """
    fetch = read or (lambda name: (Path(folder) / name).read_bytes())
    dataset = _load(folder, fetch, "dataset.yaml")
    info = _load(folder, fetch, ".info.json", ".info.yaml")
    splits = _load(folder, fetch, "split.yaml", "split.json")
    sample_type, field_map = _sample_type(f"{folder}/{META}/dataset.yaml", dataset)
    parts = splits.get("split_parts")
    where = f"{folder}/{META}/split.yaml"
    if not isinstance(parts, dict) or not isinstance(parts.get(split), list):
        known = ", ".join(map(str, parts)) if isinstance(parts, dict) else "none"
        raise UserError(f"{where} has no split {split}; it has {known}")
    excluded = {name for pattern in splits.get("exclude") or () for name in expand_braces(str(pattern))}
    tars = [name for pattern in parts[split] for name in expand_braces(str(pattern)) if name not in excluded]
    counts = info.get("shard_counts")
    counts = counts if isinstance(counts, dict) else {}
    for tar in tars:
        path = PurePosixPath(tar)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{where} names {tar}, which lies outside the folder")
        if path.suffix != ".tar":
            raise UserError(f"{where} names {tar}; only plain .tar files are read, unpack it")
        if not isinstance(counts.get(tar), int):
            raise UserError(f"{folder}/{META}/.info.json has no count for {tar}; run `energon prepare` again")
    if not tars:
        raise UserError(f"{where}: split {split} holds no shards; choose another split")
    return EnergonMeta(
        tars=tuple(tars),
        counts={tar: counts[tar] for tar in tars},
        excluded=frozenset(name for name in excluded if not name.endswith(".tar")),
        sample_type=sample_type,
        field_map=field_map,
    )


def energon_sample(meta: EnergonMeta, contents: Mapping[str, bytes]) -> tuple[list[Message], list[bytes]]:
    """Messages and encoded images of a sample, from its members' bytes by extension.

    Raises SampleError if a field is missing or is not what its type needs.
    """
    decoded: dict[str, Any] = {}

    def field(name: str, *, needed: bool = True) -> Any:
        for member, *path in meta.field_map.get(name, ()):
            if member not in contents:
                continue
            if member not in decoded:
                decoded[member] = _decode(member, contents[member])
            try:
                return _access(decoded[member], path)
            except (KeyError, IndexError, TypeError, ValueError):
                continue
        if not needed:
            return None
        raise SampleError(MISSING_IMAGE if name == "image" else BAD_JSON, f"no {name}; members: {', '.join(contents)}")

    if meta.sample_type == "TextSample":
        return text_messages(_text("text", field("text"))), []
    image = field("image")
    if not isinstance(image, bytes):
        raise SampleError(MISSING_IMAGE, "the field image is not a member of its own")
    if meta.sample_type == "VQASample":
        answer = pick_answer(field("answers"), field("answer_weights", needed=False))
        return question_messages(_text("context", field("context")), answer, 1), [image]
    name = "caption" if meta.sample_type == "CaptioningSample" else "text"
    return caption_messages(_text(name, field(name))), [image]


def split_field(text: str) -> Field:
    """ "jpg,json[a][0]" -> (("jpg",), ("json", "a", "0")). Raises ValueError."""
    options = []
    for option in text.split(","):
        match = _FIELD.fullmatch(option.strip())
        if match is None:
            raise ValueError(f"{option!r} is not NAME or NAME[field][field]")
        # Members are looked up by their extension in lower case
        options.append((match[1].lower(), *re.findall(r"\[([^\[\]]+)\]", match[2])))
    return tuple(options)


def expand_braces(text: str) -> list[str]:
    """ "a{0..2}.tar" -> a0.tar a1.tar a2.tar; "{x,y}" -> x y: a shell's braces, which energon's files hold."""
    match = _GROUP.search(text)
    if match is None:
        return [text]
    span = _RANGE.fullmatch(match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        step = abs(int(span[3] or 1)) or 1
        width = max(len(s) for s in span.groups()[:2]) if re.match(r"-?0\d", span[1]) else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        inner = [f"{number:0{width}d}" for number in numbers]
    else:
        inner = match[1].split(",")
    before, after = text[: match.start()], text[match.end() :]
    return [name for choice in inner for name in expand_braces(before + choice + after)]


def _load(folder: str | Path, fetch: Callable[[str], bytes], *names: str) -> dict[str, Any]:
    """The first of the files that is there, JSON or YAML."""
    for name in names:
        try:
            data = fetch(f"{META}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{folder}/{META}/{name} cannot be read: {error}") from None
        try:
            content = json.loads(data) if name.endswith(".json") else yaml.safe_load(data)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{folder}/{META}/{name} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise UserError(f"{folder}/{META}/{name} holds a {type(content).__name__}, not a table")
        return content
    raise UserError(f"{folder}/{META} has no {' or '.join(names)}; run `energon prepare` on it")


def _sample_type(where: str, dataset: dict[str, Any]) -> tuple[str, dict[str, Field]]:
    kind = dataset.get("sample_type")
    name = str(kind.get("__class__") if isinstance(kind, dict) else dataset.get("__class__"))
    name = _OLD_NAMES.get(name, name)
    if name not in SAMPLE_TYPES:
        raise UserError(f"{where}: sample type {name} is not read; known are {', '.join(SAMPLE_TYPES)}")
    fields = dataset.get("field_map")
    if not isinstance(fields, dict):
        raise UserError(f"{where} has no field_map (a sample_loader is Python code, which is not run); write one")
    known = SAMPLE_TYPES[name] + _OPTIONAL.get(name, ())
    if missing := [field for field in SAMPLE_TYPES[name] if not fields.get(field)]:
        raise UserError(f"{where}: field_map has no {', '.join(missing)}, which {name} needs")
    try:
        return name, {field: split_field(str(fields[field])) for field in known if fields.get(field)}
    except ValueError as error:
        raise UserError(f"{where}: field_map: {error}") from None


def _decode(member: str, data: bytes) -> Any:
    """A member as energon decodes it, by its last extension; images stay bytes."""
    extension = member.rpartition(".")[2]
    try:
        if extension in ("json", "jsn"):
            return json.loads(data)
        if extension in ("txt", "text", "transcript"):
            return data.decode("utf-8")
    except (ValueError, RecursionError) as error:
        raise SampleError(BAD_JSON, f"{member}: {error}") from None
    return data


def _access(value: Any, path: list[str]) -> Any:
    for step in path:
        if isinstance(value, (bytes, str)):
            raise TypeError("a text has no fields")
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError(BAD_JSON, f"{name} is a {type(value).__name__}, not a text")
    return value
