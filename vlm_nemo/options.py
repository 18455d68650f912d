"""What can be set: the fields of a config dataclass as dotted keys, with type, default, choices and description.

A field's description is the string under it in its source file, read with `ast`: one place for the reader of the
code and for `--help`, and nothing heavy is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

ANY_NAME = "<name>"
"""Stands in a key for a name that the user chooses: `data.sources.<name>.path`."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key of the command line."""

    key: str
    type: Any
    """The annotation, resolved: `int`, `float | None`, `list[str]` …"""
    default: Any
    """`dataclasses.MISSING` under `<name>`, where there is nothing until the user names it."""
    doc: str
    choices: tuple[str, ...] = ()
    literal: bool = False
    """The value is text to the last character: `${…}` is no reference in it."""

    @property
    def is_text(self) -> bool:
        return self.type in (str, str | None)

    @property
    def is_texts(self) -> bool:
        return self.type == list[str]

    @property
    def is_number(self) -> bool:
        """A number or a boolean, or null."""
        return self.type in (int, float, bool, int | None, float | None, bool | None)

    @property
    def is_dict(self) -> bool:
        return typing.get_origin(self.type) is dict

    @property
    def is_free_dict(self) -> bool:
        """Its members are of any type: `model.megatron`."""
        return self.type == dict[str, Any]

    @property
    def nullable(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def many_choices(self) -> bool:
        """More names than a line of the help has room for: it lists them under the description."""
        return len(self.choices) > 8

    @property
    def type_name(self) -> str:
        """As the help shows it: `int`, `float | null`, `[text, …]`."""
        names = {str: "text", int: "int", float: "float", bool: "bool", type(None): "null"}
        if typing.get_origin(self.type) is list and self.choices:
            return f"[{' | '.join(self.choices)}, …]"
        if typing.get_origin(self.type) is list:
            return _listed(self.type, names)
        if self.is_dict:
            return "{name: …}"
        if self.choices:
            return " | ".join((*self.choices[:2], "…") if self.many_choices else self.choices)
        return " | ".join(names.get(part, str(part)) for part in typing.get_args(self.type) or (self.type,))

    @property
    def expected(self) -> str:
        """As an error says it: "an integer", "a number or null", "one of bf16, fp32"."""
        names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
        if typing.get_origin(self.type) is list and self.choices:
            return f"a list of {', '.join(self.choices)}"
        if typing.get_origin(self.type) is list:
            return f"a list: {_listed(self.type, names)}"
        if self.is_dict:
            return "{name: …}"
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return " or ".join(names.get(part, str(part)) for part in typing.get_args(self.type) or (self.type,))


def _listed(kind: Any, names: dict[Any, str]) -> str:
    """list[list[int]] -> "[[int, …], …]"."""
    if typing.get_origin(kind) is not list:
        return names[kind]
    return f"[{_listed(typing.get_args(kind)[0], names)}, …]"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One config dataclass inside the root: `key` is its dotted place, "" for the root itself."""

    key: str
    title: str
    """First line of the dataclass's docstring."""
    options: tuple[Option, ...]


@cache
def sections(root: type) -> tuple[Section, ...]:
    """Every dataclass reachable from `root`, depth first, in the order in which the source files list them."""
    return tuple(_walk(root, ""))


@cache
def options(root: type) -> dict[str, Option]:
    """Dotted key -> Option, for every key that can be set on the command line of a verb with this root."""
    return {option.key: option for section in sections(root) for option in section.options}


def _walk(cls: type, prefix: str) -> Iterable[Section]:
    lineage = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    docs = {name: doc for base in lineage for name, doc in field_docs(base).items()}
    hints = typing.get_type_hints(cls)
    own: list[Option] = []
    inner: list[Section] = []
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            inner += _walk(hint, key + ".")
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        own.append(
            Option(
                key=key,
                type=hint,
                default=MISSING if ANY_NAME in key else default,
                doc=docs.get(field.name, ""),
                choices=tuple(field.metadata.get("choices", ())),
                literal=bool(field.metadata.get("literal", False)),
            )
        )
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(member := typing.get_args(hint)[1]):
            assert isinstance(member, type)
            inner += _walk(member, f"{key}.{ANY_NAME}.")
    title = (inspect.getdoc(cls) or "").split("\n")[0]
    yield Section(key=prefix.rstrip("."), title=title, options=tuple(own))
    yield from inner


@cache
def _docs_of_module(module: str) -> dict[str, dict[str, str]]:
    """{class: {field: description}} for the classes of one source file."""
    path = sys.modules[module].__file__
    assert path is not None
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs = found.setdefault(node.name, {})
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[statement.target.id] = " ".join(after.value.value.split())
    return found


def field_docs(cls: type) -> dict[str, str]:
    """{field: the string under it} of one dataclass."""
    return _docs_of_module(cls.__module__).get(cls.__name__, {})


def find(key: str, known: dict[str, Option]) -> Option | None:
    """The option that `key` names: itself, or the `<name>` key that it is a case of."""
    if key in known:
        return known[key]
    words = key.split(".")
    for pattern, option in known.items():
        parts = pattern.split(".")
        if len(parts) == len(words) and all(p in (ANY_NAME, w) for p, w in zip(parts, words, strict=True)):
            return option
    return None


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was probably meant to be, or None.

    A key may be wrong as a whole (`trainer.stepz`) or right in its last word only (`steps`, `model.tensor`).
    """

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def score(candidate: str) -> float:
        last = ratio(word.rpartition(".")[2], candidate.rpartition(".")[2])
        return max(ratio(word, candidate), 0.95 * last + 0.05 * ratio(word, candidate))

    best = max(candidates, key=score, default=None)
    return best if best is not None and score(best) >= 0.6 else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """ "; did you mean X?", or "" where nothing is near."""
    near = nearest(word, candidates)
    return f"; did you mean {near}?" if near else ""
