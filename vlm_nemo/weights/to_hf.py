"""A checkpoint of ours to a folder that Hugging Face's classes load: weights, configuration, words, pixels, card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.train import checkpoint, tensors
from vlm_nemo.types import UserError
from vlm_nemo.weights import card
from vlm_nemo.weights.config import check_exportable, hf_config_of
from vlm_nemo.weights.hf import hf_tensors, kept_names
from vlm_nemo.weights.preprocessing import preprocessor_config, processor_config
from vlm_nemo.weights.shards import cast, new_folder, write_hf, write_json
from vlm_nemo.weights.tables import exported_vision, naming_of, naming_of_part
from vlm_nemo.weights.words import export_tokenizer, generation_config


def to_folder(
    step_folder: Path,
    cfg: ModelConfig,
    template: str,
    out: Path,
    *,
    part: str | None,
    dtype: torch.dtype | None,
    max_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Write `out` from a checkpoint of configuration `cfg`; part: vision or language alone, None = the whole model.

    Raises UserError for a damaged checkpoint, a part that it lacks, a model that its family's class cannot express.
    """
    checkpoint.check(step_folder, None, ("weights/", "tokenizer/", "config.yaml"))
    reader = tensors.Reader(step_folder / "weights")
    wanted = (part,) if part else PARTS
    if lacking := [p for p in wanted if p not in reader.parts()]:
        there = " and ".join(f"part={p}" for p in ("vision", "language") if p in reader.parts())
        raise UserError(
            f"checkpoint {step_folder} has no {' and no '.join(lacking)}" + (f"; it can give {there}" if there else "")
        )
    check_exportable(cfg, wanted)
    tokenizer = Tokenizer(step_folder / "tokenizer") if "language" in wanted else None
    kept = kept_names(reader)
    naming = naming_of(cfg) if part is None else naming_of_part(cfg, part)[1]
    shown = replace(cfg, vision=exported_vision(naming, cfg, kept)) if "vision" in wanted else cfg
    with new_folder(out) as draft:
        written = write_hf(draft, _tensors(step_folder, cfg, part, dtype), max_bytes)
        config = hf_config_of(shown, tokenizer, dtype=_main_type(written), part=part)
        write_json(draft / "config.json", config)
        if "vision" in wanted:
            write_json(draft / "preprocessor_config.json", preprocessor_config(shown, part))
        if part is None:
            write_json(draft / "processor_config.json", processor_config(shown))
        if tokenizer is not None:
            export_tokenizer(tokenizer, draft, TEMPLATES[template], None if part else cfg.family)
            write_json(draft / "generation_config.json", generation_config(tokenizer, TEMPLATES[template]))
        tower_kept = any(part == "vision" for part, _ in kept)
        text = card.model_card(shown, written, config, template, part=part, source=str(step_folder), kept=tower_kept)
        (draft / "README.md").write_text(text, encoding="utf-8")
    count = sum(tensor.numel() for tensor in written.values())
    what = f"{config['architectures'][0]}, {count:,} numbers in {len(written)} tensors, {config['torch_dtype']}"
    say(f"wrote {out}: {what}")


def _tensors(
    step_folder: Path, cfg: ModelConfig, part: str | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in hf_tensors(step_folder, cfg, part):
        yield name, cast(tensor, dtype)


def _main_type(written: dict[str, Tensor]) -> str:
    """The type that most of the numbers have, as torch spells it."""
    sizes: dict[str, int] = {}
    for tensor in written.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + tensor.numel()
    return max(sizes, key=lambda kind: sizes[kind])
