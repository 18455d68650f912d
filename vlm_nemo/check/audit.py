"""The first samples of the run, planned as training plans them: what they are, how they pack, what is left out.

Lengths come from the indexes where `vlm-nemo prepare` left them; some samples are read and decoded too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_nemo.check.report import Finding, Table
from vlm_nemo.data.encode import PlannedSample
from vlm_nemo.data.packing import share_out
from vlm_nemo.data.prepare.advice import WARN_BELOW, advise, percent
from vlm_nemo.data.sample import Drop, NothingUsable, SampleError
from vlm_nemo.data.sources import Sources

READ = 64
"""Samples that are read and decoded."""
POINTS = (0, 50, 99, 100)
"""Percentiles that are told."""


@dataclass(kw_only=True)
class Found:
    """Whole steps of planned rows."""

    steps: list[list[list[PlannedSample]]]
    drops: list[Drop] = field(default_factory=list)
    end: str = ""
    """Why the plan came to an end, if it did."""

    @property
    def samples(self) -> list[PlannedSample]:
        return [sample for step in self.steps for row in step for sample in row]


def audit(sources: Sources, *, samples: int, max_tokens: int, replicas: int) -> Finding:
    """Look at the first `samples` of the order at least, in whole steps. max_tokens: the longest that the model takes;
    replicas: data-parallel ranks that a step's rows are shared out to."""
    found = plan(sources, samples, max_tokens)
    broken = read(sources, found.samples[:READ])
    return judged(sources, found, broken, replicas)


def plan(sources: Sources, samples: int, max_tokens: int) -> Found:
    """Steps of rows, as the loader plans them."""
    planner, found = sources.planner(max_tokens), Found(steps=[])
    while len(found.samples) + len(found.drops) < samples:
        try:
            step = planner.step(sources.cfg.global_packs)
        except NothingUsable as error:
            found.drops += error.drops
            found.end = str(error)
            break
        found.steps.append(step.rows)
        found.drops += step.drops
    return found


def read(sources: Sources, samples: Sequence[PlannedSample]) -> list[Drop]:
    """What cannot be used of these, found by reading and decoding them."""
    drops = []
    for sample in samples:
        try:
            sources.encoder.sample(sample)
        except SampleError as error:
            drops.append(Drop(sample.source, error.reason, sources.encoder.name(sample.source, sample.record)))
    return drops


def judged(sources: Sources, found: Found, broken: Sequence[Drop], replicas: int) -> Finding:
    """Tables, verdict and a picture."""
    cfg, samples = sources.cfg, found.samples
    faults = [found.end] if found.end else []
    faults += over_budget(sources, found, broken)
    drops = Counter((drop.source, drop.reason) for drop in (*found.drops, *broken))
    example = {(drop.source, drop.reason): drop.key for drop in (*found.drops, *broken)}
    tables = [_by_source(sources, found)]
    if drops:
        tables.append(
            Table(
                title=f"left out ({min(READ, len(samples))} samples were read, the others planned)",
                columns=("source", "reason", "samples", "for example"),
                rows=[(source, reason, f"{n:,}", example[source, reason]) for (source, reason), n in drops.items()],
            )
        )
    verdict, notes, figures = "nothing usable", [], []
    data: dict[str, Any] = {"dropped": {f"{source}: {reason}": n for (source, reason), n in drops.items()}}
    if found.steps:
        lengths = [sample.length for sample in samples]
        rows = [row for step in found.steps for row in step]
        fill = sum(lengths) / (len(rows) * cfg.pack.capacity)
        advice = advise(lengths, cfg.pack.capacity, pool=cfg.pack.pool)
        balance = vision_balance(found, replicas)
        verdict = f"{len(samples):,} samples in {len(rows):,} rows, filled to {percent(fill)}"
        if balance is not None and replicas > 1:
            verdict += f"; vision work of {replicas} replicas, largest over mean: {balance:.3f}"
        if fill < WARN_BELOW and advice.better is not None:
            verdict += f"; data.pack.capacity={advice.better.capacity} would fill to {percent(advice.better.fill)}"
        notes.append(f"by the samples' lengths: {advice}")
        figures.append(("tokens a sample", _histogram(lengths, cfg.pack.capacity)))
        data |= {"samples": len(samples), "rows": len(rows), "fill": fill, "vision_balance": balance}
    if faults:
        verdict = faults[0]
    notes += faults[1:]
    notes += [
        f"source {name} has no lengths for this tokenizer and template: training would read its records to plan"
        for name in sources.planner(1).unmeasured
    ]
    return Finding(part="data", ok=not faults, verdict=verdict, tables=tables, notes=notes, figures=figures, data=data)


def over_budget(sources: Sources, found: Found, broken: Sequence[Drop]) -> list[str]:
    """Sources of which so much has to be left out that training would stop."""
    cfg = sources.cfg
    used = Counter(sample.source for sample in found.samples)
    planned = Counter(drop.source for drop in found.drops)
    tried = Counter(sample.source for sample in found.samples[:READ])
    unread = Counter(drop.source for drop in broken)
    faults = []
    for name in sources.encoder.folders:
        own = cfg.sources[name].max_bad_fraction
        limit = cfg.max_bad_fraction if own is None else own
        seen = used[name] + planned[name]
        share = planned[name] / seen if seen else 0.0
        share += unread[name] / tried[name] if tried[name] else 0.0
        if seen >= cfg.min_samples_before_stop and share > limit:
            faults.append(
                f"{share:.1%} of the samples of {name} have to be left out, data.max_bad_fraction is {limit:.1%}"
            )
    return faults


def vision_balance(found: Found, replicas: int) -> float | None:
    """The largest share of a step's vision work over the mean, the mean of all steps; None where it cannot be said."""
    balances = []
    for step in found.steps:
        costs = [sum(sample.cost for sample in row) for row in step]
        if len(costs) % replicas or not sum(costs):
            return None
        loads = [sum(costs[i] for i in share) for share in share_out(costs, replicas)]
        balances.append(max(loads) * replicas / sum(loads))
    return float(np.mean(balances)) if balances else None


def _by_source(sources: Sources, found: Found) -> Table:
    samples = found.samples
    left_out = Counter(drop.source for drop in found.drops)
    rows = []
    for name, folder in sources.encoder.folders.items():
        mine = [sample for sample in samples if sample.source == name]
        tokens = [sample.length for sample in mine] or [0]
        images = [len(folder.sizes(sample.record)) for sample in mine] or [0]
        patches = [sample.cost for sample in mine] or [0]
        rows.append(
            (
                name,
                f"{len(mine):,}",
                f"{left_out[name]:,}",
                *(f"{np.percentile(tokens, point):,.0f}" for point in POINTS),
                f"{np.mean(images):.2f}",
                f"{np.mean(patches):,.0f}",
            )
        )
    columns = ("source", "samples", "left out", *(f"tokens, {point} %" for point in POINTS), "images", "patches")
    return Table(title="the first samples of the order, by source", columns=columns, rows=rows)


def _histogram(lengths: Sequence[int], capacity: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    axis.hist(lengths, bins=60)
    axis.axvline(capacity, color="black", linestyle="--", label="data.pack.capacity")
    axis.set_xlabel("tokens")
    axis.set_ylabel("samples")
    axis.legend()
    plt.close(figure)
    return figure
