"""`vlm-nemo evaluate`: ask a model the held-out questions; write scores, predictions and a gallery."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vlm_nemo.config import Config
from vlm_nemo.evaluate import gallery, vqa
from vlm_nemo.infer.config import InferConfig
from vlm_nemo.infer.load import open_model
from vlm_nemo.verbs.common import set_up_logging


def evaluate(cfg: Config) -> None:
    """Evaluate `checkpoint.load` (or evaluate.hf, evaluate.export) on `evaluate.data`, under the layout that the
    configuration says."""
    set_up_logging(int(os.environ.get("RANK", "0")))
    model = open_model(
        checkpoint=cfg.checkpoint.load,
        hf=cfg.evaluate.hf,
        export=cfg.evaluate.export,
        infer=InferConfig(slots=cfg.evaluate.slots),
        parallel=cfg.parallel,
        precision="auto" if cfg.evaluate.export else cfg.precision,  # an export has its own
    )
    main = model.ranks is None or model.ranks.main
    with Progress(console=Console(stderr=True), disable=not (main and sys.stderr.isatty())) as bar:
        task = bar.add_task("evaluate", total=None)
        scores, records = vqa.evaluate(
            cfg.evaluate, model, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if main:
        write_results(Path(cfg.run_dir), scores, records, model.info["source"], cfg.evaluate.gallery)
    model.close()


def write_results(out: Path, scores: vqa.Scores, records: Sequence[vqa.Answered], source: str, pictures: int) -> None:
    """scores.json, predictions.jsonl, the gallery and the contact sheet; the table goes to the screen."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(asdict(scores), indent=1) + "\n")
    with (out / "predictions.jsonl").open("w") as file:
        for record in records:
            question = gallery.question_text(record)
            line = {
                "kind": record.question.kind,
                "question": question,
                "answer": record.answer,
                "truth": record.question.truth,
                "correct": record.correct,
            }
            file.write(json.dumps(line) + "\n")
    written = [out / "scores.json", out / "predictions.jsonl"]
    shown = gallery.choose(records, pictures)
    if shown:
        gallery.write_gallery(out / "gallery.html", shown, scores, source)
        gallery.write_contact_sheet(out / "contact.png", shown)
        written += [out / "gallery.html", out / "contact.png"]
    Console().print(score_table(scores))
    print("wrote " + ", ".join(str(path) for path in written))


def score_table(scores: vqa.Scores) -> Table:
    """The scores as a person reads them."""
    table = Table(title="exact match on held-out questions")
    table.add_column("kind")
    for name in ("questions", "right", "chance", "right with swapped images"):
        table.add_column(name, justify="right")
    for kind, share in scores.accuracy.items():
        swapped = scores.swapped.get(kind)
        table.add_row(
            Text(kind),
            str(scores.n[kind]),
            f"{share:.1%}",
            f"{scores.chance[kind]:.1%}",
            "-" if swapped is None else f"{swapped:.1%}",
        )
    return table
