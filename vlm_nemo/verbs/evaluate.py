"""`vlm-nemo evaluate`: ask a checkpoint the held-out questions; write scores, predictions and a gallery."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vlm_nemo.config import Config
from vlm_nemo.evaluate import gallery, vqa
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train import checkpoint
from vlm_nemo.verbs.common import Loaded, inference_layout, set_up_logging


def evaluate(cfg: Config) -> None:
    """Evaluate `checkpoint.load` on `evaluate.data`, under the layout that the configuration says."""
    with device.adapter():
        layout = inference_layout(cfg.parallel)
        ranks = groups.start(layout, cfg.seed)
        set_up_logging(ranks.rank)
        assert cfg.checkpoint.load is not None  # the verb requires it
        loaded = Loaded(checkpoint.find(cfg.checkpoint.load), layout, cfg.precision, ranks)
        _evaluate(cfg, loaded, ranks)
        groups.stop()


def _evaluate(cfg: Config, loaded: Loaded, ranks: Ranks) -> None:
    with Progress(console=Console(stderr=True), disable=not (ranks.main and sys.stderr.isatty())) as bar:
        task = bar.add_task("evaluate", total=None)
        scores, records = vqa.evaluate(
            cfg.evaluate,
            loaded.engine,
            loaded.tokenizer,
            loaded.template,
            loaded.spec,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not ranks.main:
        return
    out = Path(cfg.run_dir)
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
    shown = gallery.choose(records, cfg.evaluate.gallery)
    if shown:
        gallery.write_gallery(out / "gallery.html", shown, scores, f"{loaded.path}")
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
            kind,
            str(scores.n[kind]),
            f"{share:.1%}",
            f"{scores.chance[kind]:.1%}",
            "-" if swapped is None else f"{swapped:.1%}",
        )
    return table
