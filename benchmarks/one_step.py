"""One setting of benchmarks.step, in a process of its own: python -m benchmarks.one_step SETTING DATA RESULT."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.made import SOURCE
from benchmarks.step import OUT_OF_MEMORY, TEMPLATES, Setting
from vlm_nemo.config import Config, build, compose
from vlm_nemo.data.loader import Loader, StepData
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.flops import Flops, step_flops
from vlm_nemo.model.layout import spec_of
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.fusion import compiled
from vlm_nemo.train import optim
from vlm_nemo.train.step import prepare_model, train_step

PEAKS = {"H100": 989.4, "H200": 989.4}
"""Dense bf16 TFLOP/s of a device by a word in its name (SXM)."""
PROFILED = 2
"""Steps."""


def configuration(setting: Setting, out: Path, *, gpu: bool, quick: bool) -> Config:
    """The recipe's stage on one device, on the made data."""
    words = [
        f"data.tokenizer={out}/tokenizer",
        f"data.template={TEMPLATES[setting.stage]}",
        f"data.pack.capacity={setting.capacity}",
        f"data.micro_packs={setting.micro_packs}",
        f"data.global_packs={setting.global_packs}",
        "parallel.tensor=1",
        "parallel.sequence=false",
        f"parallel.recompute={setting.recompute}",
        f"trainer.compile={setting.compile}",
    ]
    name = {1: "captions", 2: "instruct"}[setting.stage]
    words.append(f"data.sources.{name}.path={out / SOURCE}")
    if not gpu:
        words += ["precision=fp32", "data.threads=1"]
    cfg = build(compose("train", Config, words, f"llava15_7b/stage{setting.stage}"), Config)
    if not gpu:
        cfg.model = small(cfg.model, quick)
    return cfg


def small(cfg: ModelConfig, quick: bool) -> ModelConfig:
    """A twin that a CPU core trains: the same image, the same 576 tokens, narrow layers."""
    width = 64 if quick else 256
    vision = replace(cfg.vision, hidden_size=width // 2, num_layers=4, num_heads=4, ffn_hidden_size=2 * width)
    language = replace(
        cfg.language,
        vocab_size=2048,
        hidden_size=width,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        ffn_hidden_size=2 * width + 128,
    )
    return replace(cfg, vision=vision, language=language)


def matmul_tflops(dtype: torch.dtype, size: int, seconds: float) -> float:
    """The best rate of square products of this size, over about so long."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device.device()) for _ in range(2))
    for _ in range(3):
        out = a @ b
    device.synchronize()
    # On a CPU that others use too, the time that this process computed counts
    clock = time.perf_counter if device.on_cuda() else time.process_time
    best, ends, many = 0.0, clock() + seconds, 10 if device.on_cuda() else 1
    while clock() < ends:
        began = clock()
        for _ in range(many):
            torch.mm(a, b, out=out)
        device.synchronize()
        best = max(best, 2 * size**3 * many / (clock() - began) / 1e12)
    return best


def random_weights(chunks: list[Any], std: float) -> None:
    """Drawn on the device: seven billion numbers take minutes on a CPU."""
    generator = torch.Generator(device.device()).manual_seed(0)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    parameter.normal_(0.0, std, generator=generator)


def work(cfg: Config, data: StepData) -> Flops:
    """What the step needed, as training counts it."""
    return step_flops(
        cfg.model,
        optim.learns(cfg.optim),
        lengths=[n for batch in data.batches for n in batch.lengths],
        grids=[(rows, columns) for batch in data.batches for rows, columns in batch.images.grids.tolist()],
        supervised=sum(batch.supervised for batch in data.batches),
    )


class Running(NamedTuple):
    """A model on its data, ready to train."""

    cfg: Config
    loader: Loader
    chunks: list[Any]
    step: Callable[[int], tuple[StepData, float]]
    """Takes a step's number; gives the data it went through, and its loss."""
    matmul_tflops: float


@contextmanager
def running(setting: Setting, out: Path, *, quick: bool) -> Iterator[Running]:
    """Everything as in vlm_nemo/verbs/train.py and train/trainer.py."""
    gpu = device.on_cuda()
    cfg = configuration(setting, out, gpu=gpu, quick=quick)
    tokenizer, spec = Tokenizer(cfg.data.tokenizer), spec_of(cfg.model)
    ranks = groups.start(cfg.parallel, cfg.seed)
    dtype = device.PRECISIONS[cfg.precision]
    limits = dict(seed=cfg.seed, max_tokens=cfg.model.language.max_positions, dp_rank=0, dp_size=ranks.data)
    with closing(Loader(cfg.data, spec, tokenizer, **limits)) as loader, compiled(cfg.trainer.compile):
        peak = matmul_tflops(dtype, 8192 if gpu else 1024, 3.0 if gpu else 0.5)
        chunks = build_model(cfg.model, cfg.parallel, cfg.precision, cfg.seed, fresh=())
        random_weights(chunks, cfg.model.init_std)
        optim.freeze(chunks, optim.part_rates(cfg.optim))
        model = optim.wrap(chunks, cfg.parallel)
        optimizer = optim.build_optimizer(cfg.optim, cfg.parallel, cfg.precision, model)
        prepare_model(model)

        def step(number: int) -> tuple[StepData, float]:
            data = loader.next()
            batches = [
                model_batch(row, cfg.model, image_token=tokenizer.image_id, device=device.device())
                for row in data.batches
            ]
            optim.set_rates(optimizer, cfg.optim, number, cfg.trainer.steps)
            result = train_step(model, optimizer, batches, cfg.optim.clip_grad)
            return data, result.loss_sum / result.loss_tokens

        yield Running(cfg, loader, chunks, step, peak)
    groups.stop()


def run(setting: Setting, out: Path, *, quick: bool, profile: Path | None) -> dict[str, Any]:
    """Time the steps."""
    gpu = device.on_cuda()
    with running(setting, out, quick=quick) as (cfg, loader, chunks, step, peak):
        for number in range(1, setting.warm_up + 1):
            step(number)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        device.synchronize()
        seen, losses, waited = [], [], 0.0
        began, cpu = time.perf_counter(), time.process_time()
        for number in range(setting.warm_up + 1, setting.warm_up + setting.steps + 1):
            data, loss = step(number)
            waited += loader.wait_s
            seen.append(data)
            losses.append(loss)
        device.synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if profile is not None:
            write_profile(profile, lambda: step(setting.warm_up + setting.steps + 1))
    parts = [work(cfg, data) for data in seen]
    rows = [batch for data in seen for batch in data.batches]
    tokens, samples = (sum(getattr(row, name) for row in rows) for name in ("used_tokens", "samples"))
    busy = seconds if gpu else cpu
    tflops = sum(part.total for part in parts) / busy / 1e12
    known = next((value for word, value in PEAKS.items() if gpu and word in torch.cuda.get_device_name()), None)
    return {
        "setting": str(setting),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "waited_s": waited,
        "steps": setting.steps,
        "tokens_per_s": tokens / busy,
        "samples_per_s": samples / busy,
        "images": sum(row.images.count for row in rows),
        "fill": tokens / sum(len(row.tokens) for row in rows),
        "tflops": tflops,
        "tflop_by_part": {
            part: sum(getattr(one, part) for one in parts) / 1e12
            for part in ("vision", "projector", "language", "head")
        },
        "matmul_tflops": peak,
        "peak_tflops": known,
        "mfu": None if known is None else tflops / known,
        "memory_bytes": memory,
        "memory_reserved_bytes": torch.cuda.max_memory_reserved() if gpu else None,
        "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        "losses": losses,
    }


def write_profile(path: Path, step: Callable[[], object]) -> None:
    """A table of the operations that took longest, over a few steps."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.on_cuda() else [])]
    with profile(activities=activities) as found:
        for _ in range(PROFILED):
            step()
        device.synchronize()
    by = "self_device_time_total" if device.on_cuda() else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table + "\n")
    print(f"wrote {path}")


def alone(setting: Setting, out: Path, *, quick: bool, profile: Path | None) -> dict[str, Any]:
    """Run it in this process."""
    with device.adapter():
        return run(setting, out, quick=quick, profile=profile)


def main(words: list[str]) -> int:
    told = json.loads(words[0])
    profile, quick = told.pop("profile"), told.pop("quick")
    try:
        found = alone(Setting(**told), Path(words[1]), quick=quick, profile=Path(profile) if profile else None)
    except torch.OutOfMemoryError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return OUT_OF_MEMORY
    Path(words[2]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
