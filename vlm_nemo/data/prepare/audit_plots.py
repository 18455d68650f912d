"""audit.png: six pictures of what is in the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_nemo.data.prepare.source_manifest import Manifest
from vlm_nemo.data.prepare.survey import GRID, Survey, top_fact
from vlm_nemo.data.sample import UNWANTED, printable

LARGEST = 8
"""Sources that get a line of their own; more could not be told apart."""


def draw(
    path: Path,
    manifests: Mapping[str, Manifest],
    surveys: Mapping[str, Survey],
    lengths: Mapping[str, np.ndarray],
    fills: Mapping[str, Mapping[int, float]],
    capacity: int,
    mixed: str,
) -> None:
    """Write the picture. lengths, fills: may be empty; mixed: the name of all sources together in both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(manifests, key=lambda name: -manifests[name]["records"])[:LARGEST]
    figure, axes = plt.subplots(2, 3, figsize=(18, 10), layout="constrained")
    _samples(axes[0, 0], manifests, names)
    _sizes(figure, axes[0, 1], surveys)
    _words(axes[0, 2], surveys, names)
    _tokens(axes[1, 0], lengths, names, capacity)
    _fills(axes[1, 1], fills, names, mixed, capacity)
    _groups(axes[1, 2], surveys, names)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=90)
    plt.close(figure)
    part.replace(path)


def _samples(axis: Any, manifests: Mapping[str, Manifest], names: list[str]) -> None:
    """Used and left out by source."""
    reasons = sorted(
        {reason for name in names for reason in manifests[name]["dropped"]}, key=lambda r: (r in UNWANTED, r)
    )
    left = np.zeros(len(names))
    for i, what in enumerate(["used", *reasons]):
        counts = [manifests[n]["records"] if what == "used" else manifests[n]["dropped"].get(what, 0) for n in names]
        axis.barh(names, counts, left=left, label=what, color="tab:blue" if what == "used" else f"C{i % 9 + 1}")
        left += counts
    for name, end in zip(names, left, strict=True):
        axis.annotate(f" {manifests[name]['records']:,} of {manifests[name]['seen']:,}", (end, name), va="center")
    axis.set(title="Samples by source", xlabel="samples", xlim=(0, max(1, left.max()) * 1.3))
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower right")


def _sizes(figure: Any, axis: Any, surveys: Mapping[str, Survey]) -> None:
    """Images by width and height, all sources."""
    from matplotlib.colors import LogNorm

    grid = sum(one.grid for one in surveys.values())
    axis.set(title="Image sizes, all sources", xlabel="width, pixels", ylabel="height, pixels")
    if not np.any(grid):
        _nothing(axis, "no images")
        return
    filled = np.argwhere(np.asarray(grid) > 0)
    low, high = GRID[max(0, filled.min() - 2)], GRID[min(len(GRID) - 1, filled.max() + 3)]
    mesh = axis.pcolormesh(GRID, GRID, np.where(grid, grid, np.nan).T, norm=LogNorm(), cmap="viridis")
    axis.plot([low, high], [low, high], color="0.6", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = [t for t in (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192) if low <= t <= high]
    for one in (axis.xaxis, axis.yaxis):
        one.set_ticks(ticks, [str(tick) for tick in ticks])
        one.set_minor_locator(_no_ticks())
    bar = figure.colorbar(mesh, ax=axis, label="images")
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _words(axis: Any, surveys: Mapping[str, Survey], names: list[str]) -> None:
    longest = max((int(surveys[name].words.max(initial=1)) for name in names), default=1)
    edges = np.unique(np.geomspace(1, longest + 1, 40).astype(int))
    for name in names:
        words = np.maximum(surveys[name].words, 1)
        _steps(axis, words, edges, name)
    axis.set(title="Words a sample", xlabel="words (logarithmic)", ylabel="share of the source's samples", xscale="log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)


def _tokens(axis: Any, lengths: Mapping[str, np.ndarray], names: list[str], capacity: int) -> None:
    share = "share of the source's samples (logarithmic)"
    axis.set(title="Tokens a sample, images included", xlabel="tokens", ylabel=share, yscale="log")
    if not lengths:
        _nothing(axis, "no lengths are prepared: add tokenizer=DIR")
        return
    top = max(int(np.percentile(values, 99.5)) for values in lengths.values())
    edges = np.linspace(0, top + 1, 80)
    for name in names:
        if name in lengths:
            _steps(axis, np.minimum(lengths[name], top), edges, name)
    if capacity <= top:
        axis.axvline(capacity, color="0.4", linestyle="--", label=f"capacity {capacity}")
    axis.legend(fontsize=8)


def _steps(axis: Any, values: np.ndarray, edges: np.ndarray, name: str) -> None:
    counts = np.histogram(values, bins=edges)[0]
    axis.stairs(counts / max(1, counts.sum()), edges, label=name, linewidth=1.6, baseline=None)


def _fills(axis: Any, fills: Mapping[str, Mapping[int, float]], names: list[str], mixed: str, capacity: int) -> None:
    axis.set(title="Fill of packed rows", xlabel="capacity, tokens", ylabel="used, %")
    if not fills:
        _nothing(axis, "no lengths are prepared: add tokenizer=DIR")
        return
    for name in [*names, mixed]:
        if name in fills:
            style: dict[str, Any] = {"color": "black", "linewidth": 2.2} if name == mixed else {"linewidth": 1.4}
            capacities = list(fills[name])
            axis.plot(range(len(capacities)), [100 * fills[name][c] for c in capacities], "o-", label=name, **style)
            axis.set_xticks(range(len(capacities)), [f"{c}\n(chosen)" if c == capacity else str(c) for c in capacities])
    axis.axhline(99, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_ylim(top=101)
    axis.legend(fontsize=8, loc="lower right")


def _groups(axis: Any, surveys: Mapping[str, Survey], names: list[str]) -> None:
    """Languages where the raw data states them, else the writing."""
    fact = top_fact({name: surveys[name] for name in names})
    shares: dict[str, dict[str, float]] = {}
    for name in names:
        one = surveys[name]
        counts = one.facts[fact].get("values", {}) if fact and fact in one.facts else ({} if fact else one.scripts)
        shares[name] = {value: n / max(1, one.read) for value, n in counts.items()}
    values = sorted(
        {v for row in shares.values() for v in row}, key=lambda v: -sum(r.get(v, 0) for r in shares.values())
    )
    left = np.zeros(len(names))
    for value in values[:9]:
        widths = np.array([100 * shares[name].get(value, 0) for name in names])
        axis.barh(names, widths, left=left, label=_literal(value))
        left += widths
    axis.barh(names, 100 - left, left=left, color="0.85", label="other or not stated")
    axis.set(title=f"Texts by {_literal(fact or 'writing')}", xlabel="share of the sample, %", xlim=(0, 100))
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower right")


def _literal(text: str) -> str:
    """What the data says is no formula, and not long."""
    return printable(text, 40).replace("$", r"\$")


def _nothing(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, ha="center", va="center", transform=axis.transAxes, color="0.4")
    axis.set(xticks=[], yticks=[])
