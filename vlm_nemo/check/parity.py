"""Parity: the same samples padded, packed and under every layout must give the loss and gradients of one process.

The witness is a single process that sees one sample a row: no packing, no parallelism. Everything else is compared
with it on a tiny twin of the recipe's model, in fp32, on CPU processes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_nemo.check.made import ROWS, Subject, row_length
from vlm_nemo.check.report import Finding, Table
from vlm_nemo.check.trial import Case, Outcome, trials
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import check_layout, vision_alone
from vlm_nemo.runtime.processes import CPU, RankFailed, run_ranks
from vlm_nemo.types import UserError

LOSS = 1e-5
"""Largest difference of a loss, relative to the witness's."""
GRADIENT = 1e-4
"""Largest difference of a gradient, relative to the largest one of its module."""
TIMEOUT = 600.0
"""Seconds that all cases of one number of processes may take."""

OVERLAPPED: dict[str, Any] = dict(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "packed": (1, "packed", {}),
    "packed, two rows at once": (1, "double", {}),
    "recompute": (1, "packed", dict(recompute="full", recompute_vision="full")),
    "recompute selective": (1, "packed", dict(recompute="selective")),
    "tensor 2": (2, "packed", dict(tensor=2)),
    "tensor 2, sequence": (2, "packed", dict(tensor=2, sequence=True)),
    "tensor 2, sequence, recompute": (2, "packed", dict(tensor=2, sequence=True, recompute="full")),
    "pipeline 2": (2, "packed", dict(pipeline=2)),
    "pipeline 2, virtual 2": (2, "packed", dict(pipeline=2, virtual=2)),
    "tensor 2, images shared out": (2, "packed", dict(tensor=2, vision=1, sequence=True)),
    "pipeline 2, layers 1 and 3": (2, "packed", dict(pipeline=2, layers=[1, 3])),
    "data 2": (2, "packed", {}),
    "data 2, distributed optimizer": (2, "packed", dict(distributed_optimizer=True)),
    "expert 2": (2, "packed", dict(expert=2)),
    "tensor 2, sequence, expert 2": (2, "packed", dict(tensor=2, sequence=True, expert=2)),
    "context 2": (2, "packed", dict(context=2)),
    "context 2, recompute": (2, "packed", dict(context=2, recompute="full")),
    "data 2, overlapped": (2, "packed", OVERLAPPED),
    "tensor 4, sequence": (4, "packed", dict(tensor=4, sequence=True)),
    "pipeline 4": (4, "packed", dict(pipeline=4)),
    "tensor 2, pipeline 2, sequence": (4, "packed", dict(tensor=2, pipeline=2, sequence=True)),
    "tensor 2, data 2, sequence, distributed optimizer": (
        4,
        "packed",
        dict(tensor=2, sequence=True, distributed_optimizer=True),
    ),
    "tensor 2, data 2, expert 4, distributed optimizer": (
        4,
        "packed",
        dict(tensor=2, expert=4, distributed_optimizer=True),
    ),
    "expert 2, data 4, distributed optimizer": (4, "packed", dict(expert=2, distributed_optimizer=True)),
    "context 4": (4, "packed", dict(context=4)),
    "context 2, tensor 2, sequence": (4, "packed", dict(context=2, tensor=2, sequence=True)),
    "context 2, tensor 2, images shared out": (4, "packed", dict(context=2, tensor=2, vision=1, sequence=True)),
    "context 2, pipeline 2, virtual 2": (4, "packed", dict(context=2, pipeline=2, virtual=2)),
    "context 2, data 2, distributed optimizer": (4, "packed", dict(context=2, distributed_optimizer=True)),
    "pipeline 2, data 2, distributed optimizer": (4, "packed", dict(pipeline=2, distributed_optimizer=True)),
    "pipeline 2, data 2, overlapped": (4, "packed", dict(pipeline=2, **OVERLAPPED)),
}
"""Name -> processes, rows, and what differs from one process. All are tried that the twin's sizes allow."""
MOST = 2
"""Ranks of every kind in the recipe's own layout, at most: 8 processes in all."""
PLAIN: dict[str, Any] = dict(
    tensor=1,
    vision=None,
    pipeline=1,
    virtual=1,
    layers=[],
    context=1,
    expert=1,
    sequence=False,
    distributed_optimizer=False,
    overlap_grad_reduce=False,
    overlap_param_gather=False,
    recompute="none",
    recompute_vision="none",
)


@dataclass(kw_only=True)
class Differences:
    """Of one case from the witness."""

    case: str
    world: int
    loss: float = math.nan
    norm: float = math.nan
    later: float = math.nan
    """Of the loss after one update."""
    modules: dict[str, float] = field(default_factory=dict)
    """Of gradients, relative to the module's largest."""
    failure: str = ""
    """What a rank raised."""

    @property
    def broken(self) -> list[str]:
        """What is beyond its bound. A number that is none is."""
        found = [
            f"{name} differs by {value:.1e} (bound {bound:.0e})"
            for name, value, bound in (
                ("the loss", self.loss, LOSS),
                *((f"the gradient of {name}", value, GRADIENT) for name, value in self.modules.items()),
                ("the gradient norm", self.norm, GRADIENT),
                ("the loss after an update", self.later, LOSS),
            )
            if not value <= bound
        ]
        return [self.failure] if self.failure else found


def parity(subject: Subject, parallel: ParallelConfig) -> Finding:
    """Compare every layout that the subject's sizes allow, and the recipe's own in small. parallel: the recipe's."""
    cases, left_out = possible(subject, parallel)
    found: list[Differences] = []
    with tempfile.TemporaryDirectory() as folder:
        witness = Case(name="one sample a row", rows="padded", parallel=replace(parallel, **PLAIN))
        for world in sorted({1, *(world for world, _ in cases)}):
            these = [case for of, case in cases if of == world]
            asked = [witness, *these] if world == 1 else these
            try:
                ranks = run_ranks(trials, world, subject, asked, folder, timeout=TIMEOUT, environment=CPU)
            except RankFailed as error:
                last = str(error).strip().splitlines()[-1]
                lost = cases if world == 1 else [(world, case) for case in these]  # nothing to compare with
                found += [Differences(case=case.name, world=of, failure=last) for of, case in lost]
                if world == 1:
                    break
                continue
            if world == 1:
                truth, ranks = ranks[0][0], [ranks[0][1:]]
            for i, case in enumerate(these):
                found.append(differences(case.name, world, [rank[i] for rank in ranks], truth))
    return judged(found, left_out, row_length(subject.samples()))


def possible(subject: Subject, parallel: ParallelConfig) -> tuple[list[tuple[int, Case]], dict[str, str]]:
    """(processes, case) of what this model can do; and why the others were left out."""
    found, left_out = [], {}
    for name, (world, rows, fields) in (CASES | own(parallel)).items():
        if "expert" in fields and subject.model.language.moe.experts is None:
            continue
        layout = replace(parallel, **(PLAIN | fields))
        try:
            check_layout(layout, subject.model, world_size=world, global_packs=len(ROWS))
        except UserError as error:
            left_out[name] = str(error)
        else:
            found.append((world, Case(name=name, rows=rows, parallel=layout)))
    return found, left_out


def own(parallel: ParallelConfig) -> dict[str, tuple[int, str, dict[str, Any]]]:
    """The recipe's layout, small, as one more of CASES; none where one of these is the same.

    tensor 8, context 4, pipeline 4 -> 2 x 2 x 2 processes; fewer than 8 are two replicas.
    """
    fields = {name: getattr(parallel, name) for name in PLAIN} | {"layers": []}
    sizes = {name: min(MOST, fields[name]) for name in ("tensor", "context", "pipeline", "virtual", "expert")}
    small = replace(parallel, **(fields | sizes | {"vision": 1 if vision_alone(parallel) else None}))
    world = min(MOST**3, MOST * small.tensor * small.context * small.pipeline)
    tried = [(processes, replace(parallel, **(PLAIN | case))) for processes, _, case in CASES.values()]
    if (world, small) in tried:
        return {}
    changed = {name: value for name in PLAIN if (value := getattr(small, name)) != PLAIN[name]}
    said = ", ".join(name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in changed.items())
    return {f"the recipe's: {said}": (world, "packed", changed)}


def differences(name: str, world: int, ranks: Sequence[Outcome], truth: Outcome) -> Differences:
    """The worst of all ranks."""
    modules = {module: 0.0 for module in truth.largest}
    for rank in ranks:
        for module, off in rank.off.items():
            modules[module] = _max(modules[module], _relative(off, truth.largest[module]))
    return Differences(
        case=name,
        world=world,
        loss=_max(*(_relative(rank.loss - truth.loss, truth.loss) for rank in ranks)),
        norm=_max(*(_relative(rank.norm - truth.norm, truth.norm) for rank in ranks)),
        later=_max(*(_relative(rank.later - truth.later, truth.later) for rank in ranks)),
        modules=modules,
    )


def judged(found: Sequence[Differences], left_out: dict[str, str], length: int) -> Finding:
    """Tables and verdict."""
    modules = next((one.modules for one in found if one.modules), {})
    table = Table(
        title="largest difference from one process that sees one sample a row, relative",
        columns=("layout", "processes", "loss", "next loss", "gradient norm", *modules),
        rows=[
            (
                one.case,
                str(one.world),
                *(f"{value:.0e}" for value in (one.loss, one.later, one.norm)),
                *(f"{one.modules.get(module, math.nan):.0e}" for module in modules),
            )
            for one in found
        ],
        bad=frozenset(i for i, one in enumerate(found) if one.broken),
    )
    broken = [f"{one.case}: {', '.join(one.broken)}" for one in found if one.broken]
    if broken:
        verdict = f"{len(broken)} of {len(found)} layouts differ from one process; {broken[0]}"
    else:
        worst = max((value for one in found for value in one.modules.values()), default=0.0)
        loss = max(one.loss for one in found)
        verdict = f"{len(found)} layouts train like one process: loss within {loss:.0e}, gradients within {worst:.0e}"
    return Finding(
        part="parity",
        ok=not broken,
        verdict=verdict,
        tables=[table],
        notes=[
            f"fp32 on a tiny twin, {len(ROWS)} rows of {length} tokens, one of them without images; bounds: loss "
            f"{LOSS:.0e}, gradients {GRADIENT:.0e} of the module's largest",
            *broken[1:],
            *(f"left out {name}: {why}" for name, why in left_out.items()),
        ],
        data={
            "layouts": [
                {
                    "name": one.case,
                    "processes": one.world,
                    "loss": one.loss,
                    "next_loss": one.later,
                    "gradient_norm": one.norm,
                    "gradients": one.modules,
                    "broken": one.broken,
                }
                for one in found
            ],
            "left_out": left_out,
        },
    )


def _relative(off: float, truth: float) -> float:
    return abs(off) / max(abs(truth), 1e-12)


def _max(*values: float) -> float:
    """The largest; not a number if one is none."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
