"""What a section of config.json says, as a table that reads and writes; what our model does not do is refused by name.

Published files leave out what equals their class's default, so those defaults are part of the format and listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from vlm_nemo.types import UserError


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of ours and one of theirs."""

    ours: str
    theirs: str
    default: Any
    """Theirs, where a file leaves it out."""
    read: Callable[[Any], Any] = same
    """Theirs to ours. Raises ValueError (what it does instead) for a value that ours cannot be."""
    write: Callable[[Any], Any] = same


@dataclass(frozen=True, kw_only=True)
class Form:
    """One kind of tower or decoder."""

    model_types: tuple[str, ...]
    """As config.json names it; the first is what is written. "" = may be left out."""
    fields: tuple[Field, ...]
    always: Mapping[str, Any] = field(default_factory=dict)
    """Our switches that make this kind; every other field of ours has its default."""
    demands: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Theirs that we do in some values only: the first is the default where a file leaves it out."""
    says: tuple[str, ...] = ()
    """Of the demanded fields: those that are written."""
    free: frozenset[str] = frozenset()
    """Ours that the family decides, or that config.json does not hold."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Theirs, of all fields that we look at."""
        return {f.theirs: f.default for f in self.fields} | {name: allowed[0] for name, allowed in self.demands.items()}


def refuse(where: str, name: str, value: Any, only: str) -> UserError:
    return UserError(f"{where}: {name}={value!r} is not something this version does; {only}")


def demand(where: str, config: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> Any:
    """A field whose value must be one of `allowed`. Raises UserError."""
    value = config[name]
    if value not in allowed:
        raise refuse(where, name, value, f"it does {', '.join(repr(v) for v in allowed)}")
    return value


def read_form(form: Form, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields of a section of config.json. Raises UserError naming a field and its value."""
    config = {**form.defaults, **given}
    kind = config.get("model_type", "")
    if kind not in form.model_types and not (kind == "" and given.get("model_type") is None):
        raise refuse(where, "model_type", kind, f"it does {', '.join(repr(t) for t in form.model_types if t)}")
    for name, allowed in form.demands.items():
        demand(where, config, name, allowed)
    found = dict(form.always)
    for entry in form.fields:
        try:
            found[entry.ours] = entry.read(config[entry.theirs])
        except ValueError as only:
            raise refuse(where, entry.theirs, config[entry.theirs], str(only)) from None
    return found


def write_form(form: Form, cfg: Any) -> dict[str, Any]:
    """A section of config.json. cfg: one that the form fits (`misfits` is empty)."""
    said = {name: form.demands[name][0] for name in form.says}
    named = {"model_type": form.model_types[0]} if form.model_types[0] else {}
    return {**named, **{f.theirs: f.write(getattr(cfg, f.ours)) for f in form.fields}, **said}


def misfits(form: Form, cfg: Any) -> list[tuple[str, Any, Any]]:
    """(field of ours, its value, what the form has) where a model is not of this kind."""
    mapped = {f.ours for f in form.fields} | form.free
    found = []
    for entry in fields(cfg):
        if entry.name in mapped:
            continue
        value = getattr(cfg, entry.name)
        wanted = form.always[entry.name] if entry.name in form.always else _default(entry)
        if value != wanted:
            found.append((entry.name, value, wanted))
    for f in form.fields:
        value = getattr(cfg, f.ours)
        try:
            if f.read(f.write(value)) != value:
                found.append((f.ours, value, "another"))
        except (ValueError, KeyError, TypeError) as only:
            found.append((f.ours, value, str(only)))
    return found


def _default(entry: Any) -> Any:
    return entry.default if entry.default is not MISSING else entry.default_factory()


ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Theirs to ours."""


def activation(*allowed: str) -> tuple[Callable[[Any], str], Callable[[str], str]]:
    """(read, write) of an activation that is one of `allowed`, their names."""
    back = {ACTIVATIONS[name]: name for name in allowed}

    def read(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"it does {', '.join(repr(name) for name in allowed)}")
        return ACTIVATIONS[value]

    return read, lambda ours: back[ours]


def square(value: Any) -> int:
    """16, [16, 16] -> 16"""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int):
        raise ValueError("it does squares: one number")
    return value
