"""A training step of LLaVA-1.5: tokens and samples a second, MFU, share of the matmul peak, data wait, memory.

On a GPU: stage 1 (projector alone) and stage 2 (language model too) of llava15_7b, bf16, random weights, whole steps of
`vlm-nemo train` on one device: real JPEGs from shards made here, through the loader, forward, backward, the
distributed optimizer. On a CPU: the same with a small twin in fp32, to see that it runs and what it costs.

MFU counts what vlm_nemo/model/flops.py counts: no frozen gradients, no padding, no recomputation. The matmul peak is
measured in the same run. Where a setting does not fit the device's memory the next, smaller one is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.made import conversations, prepared
from benchmarks.mix import instruct
from benchmarks.report import HERE, RESULTS, parser, save, show

OUT_OF_MEMORY = 77
"""A run's exit code."""
PICTURES = ((640, 480), (512, 512), (480, 640), (640, 427))
TEMPLATES = {1: "plain", 2: "vicuna"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a stage is run."""

    stage: int
    capacity: int
    micro_packs: int
    recompute: str
    global_packs: int
    steps: int
    warm_up: int
    compile: str = "auto"
    """trainer.compile"""

    def __str__(self) -> str:
        return f"rows of {self.capacity} x {self.micro_packs} a forward, recompute {self.recompute}"


GPU = {
    1: [(4736, 2, "none"), (4736, 1, "none"), (4736, 1, "full")],
    # Weights, fp32 copies, moments and gradients of 6.7 G parameters are 113 GiB: little is left to activations
    2: [(3584, 1, "none"), (2048, 1, "none"), (3584, 1, "full"), (2048, 1, "full")],
}
"""(capacity, micro_packs, recompute) of each stage, the one to prefer first."""


def settings(stage: int, *, gpu: bool, quick: bool, steps: int | None) -> list[Setting]:
    """What to try, one after the other."""
    if not gpu:
        count = 1 if quick else steps or 5
        row = {1: 1216, 2: 1024} if quick else {1: 4736, 2: 3584}
        return [
            Setting(
                stage=stage,
                capacity=row[stage],
                micro_packs=1,
                recompute="none",
                global_packs=2,
                steps=count,
                warm_up=1,
            )
        ]
    return [
        Setting(
            stage=stage,
            capacity=capacity,
            micro_packs=micro,
            recompute=recompute,
            global_packs=8,
            steps=2 if quick else steps or 12,
            warm_up=1 if quick else 4,
        )
        for capacity, micro, recompute in GPU[stage]
    ]


def make(folder: Path, stage: int, samples: int, pictures: int) -> Path:
    """Shards, and the lengths of their texts: captions of a line or two, or the instruction mix."""
    rng = np.random.Generator(np.random.PCG64(stage))
    words, shown = instruct(rng, samples, image_tokens=576) if stage == 2 else (rng.integers(5, 14, samples), None)
    texts = conversations(rng, words.tolist())
    return prepared(
        folder,
        PICTURES,
        texts,
        pictures=pictures,
        tokenizer_vocab=2000,
        template=TEMPLATES[stage],
        without=frozenset() if shown is None else frozenset(np.flatnonzero(~shown).tolist()),
    )


def attempt(setting: Setting, out: Path, *, profile: Path | None, quick: bool, gpu: bool) -> dict[str, Any] | None:
    """Run a setting in a process of its own, whose memory is gone with it; None where it does not fit."""
    if quick and not gpu:
        from benchmarks.one_step import alone

        return alone(setting, out, quick=True, profile=profile)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        told = json.dumps({**asdict(setting), "quick": quick, "profile": str(profile) if profile else None})
        command = [sys.executable, "-m", "benchmarks.one_step", told, str(out), str(result)]
        allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        ended = subprocess.run(command, cwd=HERE.parent, env=allocator | os.environ, check=False).returncode
        if ended == OUT_OF_MEMORY:
            return None
        if ended:
            sys.exit(f"stage {setting.stage} ended with {ended}: {setting}")
        return json.loads(result.read_text())


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    import torch

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    if gpu and not slug.startswith("nvidia"):
        slug = f"nvidia_{slug}"
    folder = args.results or (None if args.quick else RESULTS)
    ran: list[tuple[dict[str, Any], Setting]] = []
    for stage in args.stages:
        with tempfile.TemporaryDirectory() as data:
            out = make(Path(data), stage, *((24, 3) if args.quick else (1500, 256) if gpu else (300, 24)))
            profile = Path(args.profile) / f"step_{slug}_stage{stage}.txt" if args.profile else None
            tried = settings(stage, gpu=gpu, quick=args.quick, steps=args.steps)
            for compile in args.compile or ["auto"]:
                for setting in (replace(one, compile=compile) for one in tried):
                    found = attempt(setting, out, profile=profile, quick=args.quick, gpu=gpu)
                    if found is not None:
                        ran.append((found, setting))
                        break
                    print(f"stage {stage} does not fit this device's memory with {setting}; trying the next")
                else:
                    print(f"stage {stage} fits this device's memory with no setting; left out")
    if not ran:
        sys.exit("no stage ran")
    # A device has one peak: what slowed down one process's products is not to flatter its steps
    peak = max(found["matmul_tflops"] for found, _ in ran)
    rows = [row_of(found, setting, peak) for found, setting in ran]
    show(f"one {device}", rows)
    if folder is None:
        return
    save(
        args,
        "step",
        file=f"step_{slug}",
        on=device if gpu else None,
        claim=_claim(gpu),
        figure="; ".join(_figure(row, gpu) for row in rows),
        rows=rows,
        packages=("torch", "megatron-core"),
        runs=[found for found, _ in ran],
    )


def row_of(found: dict[str, Any], setting: Setting, peak: float) -> dict[str, Any]:
    """A stage's figures as a row of the table. peak: TFLOP/s of matrix products on this device."""
    mfu = found["mfu"]
    return {
        "stage": str(setting.stage),
        "tokens/s": round(found["tokens_per_s"], 1),
        "samples/s": round(found["samples_per_s"], 3),
        "TFLOP/s": round(found["tflops"], 4),
        "MFU, %": "" if mfu is None else round(100 * mfu, 2),
        "of the matmul peak, %": round(100 * found["tflops"] / peak, 2),
        "matmul peak, TFLOP/s": round(peak, 4),
        "data wait, %": round(100 * found["waited_s"] / found["seconds"], 2),
        "peak memory, GiB": round(found["memory_bytes"] / 2**30, 2),
        "fill, %": round(100 * found["fill"], 2),
        "compile": setting.compile,
        "setting": str(setting),
    }


def _claim(gpu: bool) -> str:
    if gpu:
        return "A step of LLaVA-1.5 7B on one GPU: stage 1 at least 50 % MFU, stage 2 48 %; data wait below 1 %"
    return "A step of a small LLaVA on one CPU core, fp32: no goal, shows that the benchmark runs"


def _figure(row: dict[str, Any], gpu: bool) -> str:
    compiling = "" if row["compile"] == "auto" else f" (compile {row['compile']})"
    share = f"{row['MFU, %']} % MFU, " if row["MFU, %"] != "" else ""
    return (
        f"stage {row['stage']}{compiling}: {share}{row['of the matmul peak, %']} % of the matmul peak, "
        f"{row['tokens/s']:,} tokens/s, {row['samples/s']} samples/s, data wait {row['data wait, %']} %, "
        f"{row['peak memory, GiB']} GiB"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    found = parser("benchmarks.step", __doc__)
    found.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="default: 1 2")
    found.add_argument("--steps", type=int, help="timed steps; default 12 on a GPU, 5 on a CPU")
    found.add_argument(
        "--compile",
        nargs="+",
        choices=("auto", "always", "never"),
        help="trainer.compile; each stage is run with each, default: auto",
    )
    found.add_argument("--profile", metavar="DIR", help="write tables of the operations that took longest to DIR")
    return found.parse_args(argv)


if __name__ == "__main__":
    main()
