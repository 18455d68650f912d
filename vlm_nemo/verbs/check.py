"""`vlm-nemo check`: rehearse a run, part by part, and say what would go wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from vlm_nemo.check import report
from vlm_nemo.check.audit import audit
from vlm_nemo.check.config import PARTS
from vlm_nemo.check.dry import dry
from vlm_nemo.check.features import cache_size
from vlm_nemo.check.labels import Spoken
from vlm_nemo.check.leaks import leaks
from vlm_nemo.check.made import Subject, conversations, subject
from vlm_nemo.check.parity import parity
from vlm_nemo.check.plan import Job, plan
from vlm_nemo.check.report import Finding
from vlm_nemo.check.rows import IMAGE, blank_row, blank_sample, full_row
from vlm_nemo.check.sizes import many
from vlm_nemo.check.sources import absent, spoken_samples
from vlm_nemo.config import CheckRoot
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.sources import Sources, open_sources, template_of
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.share import embedders
from vlm_nemo.model.stages import Work, work_of
from vlm_nemo.model.twin import twin
from vlm_nemo.types import PackedBatch, UserError
from vlm_nemo.verbs.common import set_up_logging
from vlm_nemo.verbs.cut import first_work

LABELS = 500
"""Samples whose labels are derived once more."""
TYPICAL = 64
"""Rows of which the plan's is the middle one."""
WIDTH = 160
"""Columns of the tables where there is no terminal."""


def check(cfg: CheckRoot) -> None:
    """Run the parts that check.parts names; print and write what they found. Raises UserError if one failed."""
    set_up_logging(0)
    spec_of(cfg.model)  # what does not go together at all is said before anything runs
    with tempfile.TemporaryDirectory() as folder:
        parts = _parts(cfg, Path(folder))
        findings = []
        for name in (name for name in PARTS if name in cfg.check.parts):
            Console(stderr=True).print(f"check: {name} …", highlight=False)
            try:
                findings.append(parts[name]())
            except UserError as error:
                findings.append(Finding(part=name, ok=False, verdict=str(error)))
    page = report.write(Path(cfg.check.out), findings, f"rehearsal of {cfg.recipe}")
    console = Console()
    if not console.is_terminal:  # a log file is wide enough
        console.width = WIDTH
    report.show(findings, console)
    print(f"wrote {page}")
    if failed := [finding.part for finding in findings if not finding.ok]:
        raise UserError(f"check of {cfg.recipe} failed: {', '.join(failed)}; the table and {page} say why")


def _parts(cfg: CheckRoot, folder: Path) -> dict[str, Callable[[], Finding]]:
    """folder: for what the parts hand to processes."""
    nothing = absent(cfg.data)
    small: list[Subject] = []

    def tiny() -> Subject:
        if not small:
            template_of(cfg.data)
            small.append(subject(twin(cfg.model), cfg.optim, cfg.data.template, folder / "tokenizer"))
        return small[0]

    def on_data(part: str, run: Callable[[], Finding]) -> Callable[[], Finding]:
        if nothing is None:
            return run
        return lambda: Finding(part=part, ok=True, skipped=True, verdict=f"nothing to look at: {nothing}")

    return {
        "plan": lambda: _plan(cfg, nothing is None),
        "parity": lambda: parity(tiny(), cfg.parallel),
        "leaks": lambda: _leaks(cfg, tiny(), nothing is None),
        "data": on_data("data", lambda: _data(cfg)),
        "dry": on_data("dry", lambda: dry(cfg.model, cfg.data, cfg.optim, seed=cfg.seed)),
    }


def _plan(cfg: CheckRoot, there_is_data: bool) -> Finding:
    row, image_token, assumed, work = _typical_row(cfg, there_is_data)
    job = Job(
        model=cfg.model,
        parallel=cfg.parallel,
        precision=cfg.precision,
        optim=cfg.optim,
        global_packs=cfg.data.global_packs,
        micro_packs=cfg.data.micro_packs,
        capacity=cfg.data.pack.capacity,
        world=cfg.check.world,
        batch=lambda parallel: model_batch(
            row,
            cfg.model,
            image_token=image_token,
            device=torch.device("cpu"),
            context=(0, parallel.context),
            sharing=(0, embedders(parallel, kept=work.kept).ranks),
        ),
        work=work,
    )
    found = plan(job, memory_gib=cfg.check.memory_gib, reserve_gib=cfg.check.reserve_gib, assumed=assumed)
    return found if cfg.data.vision_cache is None else _with_cache(cfg, found, there_is_data)


def _with_cache(cfg: CheckRoot, found: Finding, there_is_data: bool) -> Finding:
    """The plan with what data.vision_cache needs of its disk."""
    assert cfg.data.vision_cache is not None
    size = cache_size(cfg.data, cfg.model, cfg.optim, cfg.precision, there=there_is_data)
    line = size.said(cfg.data.vision_cache)
    if size.fits:
        return replace(found, notes=[*found.notes, line], data={**found.data, "vision_cache": asdict(size)})
    verdict = line if found.ok else f"{found.verdict}; {line}"
    return replace(found, ok=False, verdict=verdict, data={**found.data, "vision_cache": asdict(size)})


def _typical_row(cfg: CheckRoot, there_is_data: bool) -> tuple[PackedBatch, int, str, Work]:
    """A micro-batch, the id of its placeholders, what it is, and the rows by which stages are balanced."""
    spec, rows = spec_of(cfg.model), cfg.data.micro_packs
    capacity, kept = cfg.data.pack.capacity * rows, cfg.data.vision_cache is not None
    if there_is_data:
        sources = _open(cfg)
        planned = (
            sources.planner(cfg.model.language.max_positions).step(max(rows, min(cfg.data.global_packs, TYPICAL))).rows
        )
        planned.sort(key=lambda row: sum(sample.cost for sample in row))
        middle = max(0, min((len(planned) - rows + 1) // 2, len(planned) - rows))
        samples = [sample for row in planned[middle : middle + rows] for sample in row]
        row = blank_row(sources.encoder, samples, capacity)
        what = f"a micro-batch of the data's first {len(planned)} rows, the middle one by vision work: "
        matters = cfg.parallel.pipeline > 1 or embedders(cfg.parallel, kept=False).shared
        work = first_work(cfg, sources) if matters else work_of([row], cfg.model, kept=kept)
        return row, sources.encoder.tokenizer.image_id, what + _what(row), work
    width, height = cfg.check.image
    sample = blank_sample(spec, [plan_image(spec, (width, height))], cfg.check.text)
    row = full_row(spec, sample, capacity)
    what = f"no data to look at, so every sample has an image of {width} x {height} and {cfg.check.text} tokens of text"
    return row, IMAGE, f"{what}: {_what(row)}", work_of([row], cfg.model, kept=kept)


def _what(row: PackedBatch) -> str:
    samples, images = many(row.samples, "sample"), many(row.images.count, "image")
    return f"{samples}, {images} of {many(len(row.images.patches), 'patch', 'es')} in all"


def _leaks(cfg: CheckRoot, small: Subject, there_is_data: bool) -> Finding:
    template = template_of(cfg.data)
    if there_is_data:
        sources = _open(cfg)
        spoken = spoken_samples(sources, min(LABELS, cfg.check.samples))
        return leaks(small, spoken, sources.encoder.tokenizer, template, "samples of the recipe")
    made = zip(conversations(spec_of(small.model).size), small.samples(), strict=True)
    spoken = [Spoken(one.messages, sample, f"sample {i}") for i, (one, sample) in enumerate(made, 1)]
    return leaks(small, spoken, Tokenizer(small.tokenizer), template, "made-up samples")


def _data(cfg: CheckRoot) -> Finding:
    sources = _open(cfg)
    return audit(
        sources,
        samples=cfg.check.samples,
        max_tokens=cfg.model.language.max_positions,
        replicas=max(1, cfg.check.world // (cfg.parallel.tensor * cfg.parallel.context * cfg.parallel.pipeline)),
    )


def _open(cfg: CheckRoot) -> Sources:
    return open_sources(cfg.data, spec_of(cfg.model), Tokenizer(cfg.data.tokenizer), seed=cfg.seed)
