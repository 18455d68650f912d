"""A training step of the small LLaVA of benchmarks.step, with trainer.compile=always and never, on one CPU core.

The same model on the same stream of rows; the kernels are made before anything is timed. On a GPU, where a step is of
a whole 7B and its time is steady, `python -m benchmarks.step --compile never always` compares the two.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.paired import Side, compare, timed
from benchmarks.report import parser, save, show

SAMPLES, PICTURES = 300, 24


def measure(stage: int, pairs: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of the table, and what it comes from."""
    from benchmarks.one_step import running
    from benchmarks.step import make, settings
    from vlm_nemo.runtime import device
    from vlm_nemo.runtime.fusion import compiled

    if device.on_cuda():
        sys.exit("this compares CPU time; on a GPU: python -m benchmarks.step --compile never always")
    (setting,) = settings(stage, gpu=False, quick=quick, steps=1)
    with tempfile.TemporaryDirectory() as data, device.adapter():
        out = make(Path(data), stage, *((24, 3) if quick else (SAMPLES, PICTURES)))
        with running(setting, out, quick=quick) as model:
            numbers = itertools.count(1)

            def side(compile: str) -> Side:
                def step() -> None:
                    with compiled(compile):
                        model.step(next(numbers))

                return timed(step)

            found = compare(side("always"), side("never"), pairs)
    ratio, low, high = found.ratio()
    mine, other = found.rates(1)
    row = {
        "stage": str(stage),
        "compiled, CPU s a step": round(1 / mine, 2),
        "not compiled": round(1 / other, 2),
        "times": round(ratio, 3),
        "95 %": f"{low:.3f} to {high:.3f}",
    }
    return row, found._asdict()


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    found = [measure(stage, 1 if args.quick else args.pairs or 20, args.quick) for stage in args.stages]
    rows = [row for row, _ in found]
    show("a step with trainer.compile=always and never", rows)
    save(
        args,
        "fusing",
        claim="A step of a small LLaVA on a CPU with trainer.compile=always, against never",
        figure="; ".join(
            f"stage {row['stage']}: {row['times']} times ({row['95 %']}) the steps a CPU s" for row in rows
        ),
        rows=rows,
        packages=("torch", "megatron-core"),
        runs=[raw for _, raw in found],
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    found = parser("benchmarks.fusing", __doc__)
    found.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="default: 1 2")
    found.add_argument("--pairs", type=int, help="pairs of steps of each stage; default 20")
    return found.parse_args(argv)


if __name__ == "__main__":
    main()
