"""What a table of names is made of: rows that serve both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vlm_nemo.weights.transforms import IDENTITY, Sizes, Transform

LAYER, EXPERT = "{layer}", "{expert}"
"""Stand for the number of a layer, and of an expert in it, in both names of a row."""


def always(cfg: Any) -> bool:
    """The condition of what every model has."""
    return True


def every(cfg: Any, layer: int) -> bool:
    """The condition of what every layer has."""
    return True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: our global key and the names, inside its part, of the tensors that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = IDENTITY
    when: Callable[[Any], bool] = always
    """Whether a model has it, by its part's configuration (VisionConfig, ProjectorConfig, LanguageConfig)."""
    layers: Callable[[Any, int], bool] = every
    """Which layers have it: (the part's configuration, a layer's number from 0)."""


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A tensor that a class wants and no forward pass of ours reads: written where nothing was kept."""

    theirs: str
    value: float
    """Of every element."""
    like: str
    """Our key of the tensor whose shape and type it has."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """All names of a kind of part."""

    rows: tuple[Row, ...]
    idle: tuple[str, ...] = ()
    """Patterns of tensors that published files hold and our forward pass does not read; kept beside the weights."""
    stand_ins: tuple[StandIn, ...] = ()
    when_stood_in: Callable[[Any], bool] = always
    """Of the stand-ins: whether a model needs them."""

    def is_idle(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.idle)

    def entries(self, part: str, cfg: Any, layers: int, sizes: Sizes) -> Iterator[Entry]:
        """The rows of one model: those that there are once, then layer by layer."""
        rows = [row for row in self.rows if row.when(cfg)]
        for row in (row for row in rows if LAYER not in row.ours):
            yield Entry(part=part, ours=row.ours, theirs=row.theirs, transform=row.transform, sizes=sizes)
        for layer in range(layers):
            for row in (row for row in rows if LAYER in row.ours and row.layers(cfg, layer)):
                for expert in range(sizes.experts if EXPERT in row.ours else 1):

                    def numbered(name: str, layer: int = layer, expert: int = expert) -> str:
                        return name.replace(LAYER, str(layer)).replace(EXPERT, str(expert))

                    theirs = tuple(numbered(name) for name in row.theirs)
                    yield Entry(part=part, ours=numbered(row.ours), theirs=theirs, transform=row.transform, sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row for one layer of one model."""

    part: str
    ours: str
    theirs: tuple[str, ...]
    """Names inside the part; `spelling.spelled` makes a file's names of them."""
    transform: Transform
    sizes: Sizes


def linear(
    ours: str,
    *theirs: str,
    transform: Transform = IDENTITY,
    when: Callable[[Any], bool] = always,
    bias: Callable[[Any], bool] = always,
    layers: Callable[[Any, int], bool] = every,
) -> tuple[Row, Row]:
    """The rows of a weight and its bias; bias: whether a model has one."""

    def row(end: str, condition: Callable[[Any], bool]) -> Row:
        names = tuple(f"{name}.{end}" for name in theirs)
        return Row(ours=f"{ours}.{end}", theirs=names, transform=transform, when=condition, layers=layers)

    return row("weight", when), row("bias", lambda cfg: when(cfg) and bias(cfg))


def norm(ours: str, theirs: str, when: Callable[[Any], bool] = always) -> tuple[Row, Row]:
    """The rows of a norm whose kind the configuration says: an RMSNorm has no bias."""
    return linear(ours, theirs, when=when, bias=lambda cfg: cfg.norm == "layernorm")
