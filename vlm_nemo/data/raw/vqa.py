"""Tables of questions about images: a row has an image, a question and an answer, in columns of any name.

The image is bytes, a path, the struct {bytes, path} of Hugging Face's data sets, a list of these, or nothing. Of
several answers the most frequent is taken, the first of equals (VQAv2's and TextVQA's ten).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw.messages import pick_answer, question_messages
from vlm_nemo.data.raw.table import Rows, list_rows
from vlm_nemo.data.raw.unit import Map, RawDrop, RawSample, attempt, digest, facts_of, read_image, shard_image, stamp
from vlm_nemo.data.sample import BAD_JSON, SampleError
from vlm_nemo.data.turns import check_images, check_turns

OPTIONS = {"image": "image", "question": "question", "answer": "answer", "group": "", "suffix": ""}
"""Columns, and their names where the manifest gives none. `group` is the record's kind; `suffix` ends each question."""


@dataclass(frozen=True, kw_only=True)
class VqaUnit:
    """A piece of a table."""

    rows: Rows
    images: str
    """Folder of the images that the table names."""
    options: dict[str, str]

    @property
    def count(self) -> int:
        return self.rows.count

    def fingerprint(self) -> str:
        column = self.options["image"]
        stamps = []
        for row in self.rows.read(_without_bytes(self.rows, column)):
            for value in _values(row, column):
                if path := _path(value):
                    stamps.append(stamp(Path(self.images) / path))
        return digest("vqa", self.rows.parts(), self.options, stamps)

    def read(self) -> Iterator[RawSample | RawDrop]:
        for number, row in enumerate(self.rows.read()):
            yield attempt(self.rows.name(number), partial(self._sample, row=row))

    def _sample(self, name: str, row: Any) -> RawSample:
        if not isinstance(row, dict):
            raise SampleError(BAD_JSON, "not a row of columns")
        options = self.options
        for key in ("question", "answer"):
            if options[key] not in row:
                raise SampleError(BAD_JSON, f"no column {options[key]!r}; columns: {', '.join(map(str, row))}")
        question = row[options["question"]]
        if not isinstance(question, str):
            raise SampleError(BAD_JSON, f"the question is a {type(question).__name__}, not a text")
        images = [_bytes(value, Path(self.images)) for value in _values(row, options["image"])]
        messages = question_messages(question, pick_answer(row[options["answer"]]), len(images), options["suffix"])
        check_images(messages, len(images))
        check_turns(messages)
        group = row.get(options["group"]) if options["group"] else None
        facts = facts_of(row, {options[key].lower() for key in ("image", "question", "answer")})
        return RawSample(
            name, messages, None if group is None else str(group), [shard_image(image) for image in images], facts
        )


def list_vqa(where: dict[str, Path], options: dict[str, str], shard_samples: int, apply: Map) -> list[VqaUnit]:
    """Units of a table. Raises UserError if it cannot be read."""
    del apply
    path = where["path"]
    images = where.get("images", path if path.is_dir() else path.parent)
    given = OPTIONS | options
    return [VqaUnit(rows=rows, images=str(images), options=given) for rows in list_rows(path, shard_samples)]


def _values(row: Any, column: str) -> list[Any]:
    value = row.get(column) if isinstance(row, dict) else None
    values = value if isinstance(value, list) else [value]
    return [value for value in values if value is not None and value != ""]


def _path(value: Any) -> str | None:
    """The file that holds an image, where its bytes are not there."""
    if isinstance(value, dict):
        value = None if value.get("bytes") is not None else value.get("path")
    return value if isinstance(value, str) else None


def _bytes(value: Any, folder: Path) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    path = _path(value)
    if path is None:
        raise SampleError(BAD_JSON, f"an image is a {type(value).__name__}: neither bytes, a path nor both")
    return read_image(folder, path)


def _without_bytes(rows: Rows, column: str) -> list[str] | None:
    """What to read of a parquet to learn the images' paths; an empty list where the images lie in it."""
    if not rows.path.endswith(".parquet"):
        return None
    import pyarrow.parquet
    import pyarrow.types as types

    schema = pyarrow.parquet.read_schema(rows.path)
    kind = schema.field(column).type if column in schema.names else pyarrow.binary()
    while types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    # A struct that has bytes is taken to hold them all: its own stamp tells of any change
    return [column] if types.is_string(kind) or types.is_large_string(kind) else []
