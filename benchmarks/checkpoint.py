"""How long a training step is held up by a checkpoint: waiting for the disk, and written in the background.

One process, AdamW in fp32; weights and optimizer of every checkpoint are written, hashed (SHA-256) and brought to the
disk (fsync) either way, and both write the same bytes. By turns: a step, a save, steps until it is on the disk.

ours, in the background   the step waits for a copy in memory
waiting for the disk      checkpoint.asynchronous=false

Wall-clock time: what is measured is waiting. `later steps` is what the steps lost while the writer shared their cores
and their disk, over the steps before any save. A GPU's copies go over its bus and its steps need no core of the host;
nothing here says how long those take.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import parser, save, show
from vlm_nemo.check.rows import IMAGE, blank_sample, full_row
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.saver import Saver
from vlm_nemo.train.step import prepare_model, train_step

OURS, WAITING = "in the background (ours)", "waiting for the disk"


def main(argv: list[str] | None = None) -> None:
    args = parser(__spec__.name, __doc__).parse_args(argv)
    width, layers, turns = (64, 2, 1) if args.quick else (384, 6, 5)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        with device.adapter():
            found, parameters = measure(folder, width, layers, turns)
    finally:
        shutil.rmtree(folder)
    rows = [
        {
            "way": way,
            "held up, s": statistics.median(times["held"]),
            "later steps, s": statistics.median(times["slower"]),
            "on the disk after, s": statistics.median(times["done"]),
            "a step alone, s": statistics.median(found["alone"]["step"]),
            "MB": times["megabytes"][0],
        }
        for way, times in found.items()
        if way != "alone"
    ]
    show(f"a checkpoint of {parameters / 1e6:.0f} million parameters with their optimizer, {turns} by turns", rows)
    by_way = {row["way"]: row for row in rows}
    ours, theirs = by_way[OURS], by_way[WAITING]
    save(
        args,
        "checkpoint",
        claim="A checkpoint in the background holds a step up for a copy in memory alone",
        figure=f"{ours['held up, s']:.3f} s against {theirs['held up, s']:.3f} s for {ours['MB']:,.0f} MB; the steps "
        f"meanwhile lose {ours['later steps, s']:.2f} s in all, on cores that they share with the writer",
        rows=rows,
        packages=("torch", "megatron-core", "safetensors"),
    )


def measure(folder: Path, width: int, layers: int, turns: int) -> tuple[dict[str, dict[str, list[float]]], int]:
    """way -> what was measured, a value a turn; and the model's parameters."""
    cfg = ModelConfig(
        vision=VisionConfig(
            image_size=56, patch_size=14, hidden_size=64, num_layers=2, num_heads=4, ffn_hidden_size=128
        ),
        projector=ProjectorConfig(),
        language=LanguageConfig(
            vocab_size=8192,
            hidden_size=width,
            num_layers=layers,
            num_heads=width // 64,
            num_kv_heads=width // 64,
            ffn_hidden_size=4 * width,
        ),
    )
    parallel = ParallelConfig()
    ranks = groups.start(parallel, seed=0)
    chunks = build_model(cfg, parallel, "fp32", seed=0)
    rates = OptimConfig(vision_lr=1e-4, projector_lr=1e-4, language_lr=1e-4)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
    prepare_model(model)
    spec = spec_of(cfg)
    row = full_row(spec, blank_sample(spec, [plan_image(spec, (56, 56))], text=40), 128)
    batch = model_batch(row, cfg, image_token=IMAGE, device=torch.device("cpu"))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def step() -> float:
        began = time.perf_counter()
        train_step(model, optimizer, [batch], 1.0)
        return time.perf_counter() - began

    more: dict[str, Any] = dict(
        ranks=ranks, chunks=chunks, optimizer=optimizer, write_extras=lambda folder: None, keep=1
    )
    savers = {way: Saver(folder / str(i), asynchronous=way == OURS, **more) for i, way in enumerate((OURS, WAITING))}
    step()
    step()
    for saver in savers.values():  # takes the memory of the copies and the first pages of the files
        saver.save(0, {"updates": 2})
        saver.wait()
    number = 0
    for turn in range(turns):
        alone = [step() for _ in range(3)]
        found["alone"]["step"] += alone
        for way in (OURS, WAITING) if turn % 2 == 0 else (WAITING, OURS):
            saver, number = savers[way], number + 1
            began = time.perf_counter()
            path = saver.save(number, {"updates": 2})
            found[way]["held"].append(time.perf_counter() - began)
            lost = 0.0
            while not path.is_dir():
                lost += step() - statistics.median(alone)
            found[way]["slower"].append(lost)
            found[way]["done"].append(time.perf_counter() - began)
            saver.wait()
            found[way]["megabytes"].append(sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / 1e6)
    for saver in savers.values():
        saver.close()
    groups.stop()
    return found, sum(p.numel() for chunk in chunks for p in chunk.parameters())


if __name__ == "__main__":
    main()
