"""Tables of rows: parquet, JSON, JSON lines, csv and tsv, one file or a folder of them, cut into pieces.

A piece of a parquet or a JSON lines file knows where its rows lie and reads them when they are wanted, so a table may
be larger than memory. JSON lists, csv and tsv are read once, here, and a piece holds its own rows.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_nemo.data.raw.unit import stamp
from vlm_nemo.types import UserError

DEEPEST = 32
"""Levels of lists and tables in a row."""
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows `first` to `first + count` of a file."""

    path: str
    first: int
    count: int
    offset: int = 0
    """Of JSON lines: where the first row begins, bytes."""
    held: list[Any] | None = None
    """The rows themselves, where the file cannot be read in parts."""

    def name(self, number: int) -> str:
        """Of the row at `number` in this piece."""
        return f"{Path(self.path).name} row {self.first + number}"

    def parts(self) -> list[Any]:
        """What a fingerprint is made from."""
        content: Any = stamp(Path(self.path)) if self.held is None else self.held
        return [Path(self.path).name, self.first, self.count, content]

    def read(self, columns: list[str] | None = None) -> Iterator[Any]:
        """Each row as a table by column, or its text where it is not JSON.

        columns: of a parquet, read these only.
        """
        if self.held is not None:
            yield from self.held
        elif self.path.endswith(".parquet"):
            yield from _parquet_rows(Path(self.path), self.first, self.count, columns)
        else:
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                found = 0
                while found < self.count:
                    line = stream.readline()
                    if line.strip() or not line:
                        found += 1
                        yield parse_line(line)


def list_rows(path: Path, shard_samples: int) -> list[Rows]:
    """Pieces of a file, or of all files of a folder, of at most `shard_samples` rows.

    Raises UserError if there is none or one cannot be read.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or files[0].suffix not in SUFFIXES:
        raise UserError(f"{path} is no table: give a file, or a folder of files, of {', '.join(SUFFIXES)}")
    try:
        return [rows for file in files for rows in _cut(file, shard_samples)]
    except (OSError, ValueError, csv.Error) as error:  # UnicodeDecodeError and pyarrow's are ValueErrors too
        raise UserError(f"{path} cannot be read: {error}") from None


def read_list(path: Path) -> list[Any]:
    """Rows of a JSON list, or of JSON lines; one that Python cannot parse is its text. Raises UserError."""
    try:
        if path.suffix == ".jsonl":
            with open(path, "rb") as stream:
                return [parse_line(line) for line in stream if line.strip()]
        text = path.read_text(encoding="utf-8")
        try:
            rows = json.loads(text)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError):  # too deep, or a number too long: the row's fault, not the file's
            rows = [parse_line(row) for row in _split_list(text)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}, not a list")
    return [_shallow(row) for row in rows]


def parse_line(line: str | bytes) -> Any:
    """A line of JSON, or its text if it is none."""
    try:
        return _shallow(json.loads(line))
    except (ValueError, RecursionError):
        return line if isinstance(line, str) else line.decode("utf-8", "replace")


_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
"""A text as a whole, or what opens, closes or parts."""


def _split_list(text: str) -> list[str]:
    """The texts of a JSON list's items, by brackets and commas alone: '[1, {"a": [2]}]' -> ['1', '{"a": [2]}']

    Raises ValueError if it is no list, or goes on after its end.
    """
    items: list[str] = []
    depth = start = 0
    for mark in _MARK.finditer(text):
        if mark[0] in "[{":
            depth += 1
            if depth == 1:
                if text[: mark.end()].strip() != "[":
                    break
                start = mark.end()
        elif mark[0] in "]}":
            depth -= 1
            if depth == 0:
                if text[mark.start() :].strip() != "]":
                    break
                return [*items, text[start : mark.start()].strip()]
        elif mark[0] == "," and depth == 1:
            items.append(text[start : mark.start()].strip())
            start = mark.end()
    raise ValueError("not a list of rows")


def _shallow(row: Any) -> Any:
    """The row, or what is said in its place: one that is nested deeply cannot be sent to another process."""
    return row if _fits(row, DEEPEST) else f"a row nested more than {DEEPEST} deep"


def _fits(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_fits(part, levels - 1) for part in parts if isinstance(part, (dict, list)))


def _cut(file: Path, size: int) -> list[Rows]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            total = table.metadata.num_rows
        return [Rows(path=str(file), first=i, count=min(size, total - i)) for i in range(0, total, size)]
    if file.suffix == ".jsonl":
        starts, total = _line_starts(file, size)
        return [
            Rows(path=str(file), first=i * size, count=min(size, total - i * size), offset=start)
            for i, start in enumerate(starts)
        ]
    rows = read_list(file) if file.suffix == ".json" else _read_csv(file)
    pieces = [(i, rows[i : i + size]) for i in range(0, len(rows), size)]
    return [Rows(path=str(file), first=i, count=len(piece), held=piece) for i, piece in pieces]


def _line_starts(file: Path, size: int) -> tuple[list[int], int]:
    """Where every size-th line that is not empty begins; number of such lines."""
    starts, total, position = [], 0, 0
    with open(file, "rb") as stream:
        for line in stream:
            if line.strip():
                if total % size == 0:
                    starts.append(position)
                total += 1
            position += len(line)
    return starts, total


def _read_csv(file: Path) -> list[Any]:
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        # In a tsv a quotation mark is a letter like any other
        form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
        return list(csv.DictReader(stream, restkey="more", **form))


def _parquet_rows(file: Path, first: int, count: int, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    """Only the row groups that hold them are read."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        start = 0
        for group in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            low, high = max(first, start), min(first + count, start + rows)
            if low < high:
                try:
                    found = table.read_row_group(group, columns=columns).slice(low - start, high - low)
                except (OSError, ValueError) as error:
                    raise UserError(f"{file} is damaged ({error}); fetch it again or move it away") from None
                for batch in found.to_batches(max_chunksize=64):  # images become Python's bytes a few at a time
                    yield from batch.to_pylist()
            start += rows
