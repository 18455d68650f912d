"""`vlm-nemo export`: a checkpoint, or a folder of Hugging Face, to graphs and engines that need no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.export.config import ExportConfig
from vlm_nemo.export.covered import check_covered
from vlm_nemo.export.reference import TorchReference
from vlm_nemo.export.write import Source, Wish, write_export
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import checkpoint
from vlm_nemo.train.origin import check_vocabulary, checkpoint_config, model_config
from vlm_nemo.types import UserError
from vlm_nemo.verbs.common import set_up_logging
from vlm_nemo.weights.config import check_exportable, hf_config_of, model_config_of
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.hf import hf_tensors, load_hf_weights
from vlm_nemo.weights.hf_folder import HFFolder
from vlm_nemo.weights.preprocessing import preprocessor_config
from vlm_nemo.weights.shards import write_json
from vlm_nemo.weights.words import export_tokenizer, generation_config, import_tokenizer, template_of


def export(cfg: ExportConfig) -> None:
    """Write the export; prints what it does, the parity figures and what it wrote."""
    if cfg.engine == "none" and cfg.engine_sm:
        raise UserError(f"engine_sm={cfg.engine_sm} is for engine=tensorrt_rtx; engine=none compiles nothing")
    precision = cfg.precision
    if precision == "auto":
        precision = "fp32" if cfg.engine == "none" else "bf16"
    with ExitStack() as opened:
        opened.enter_context(device.adapter())
        groups.start(ParallelConfig(), seed=0)
        opened.callback(groups.stop)
        set_up_logging(0)
        source = _from_hf(cfg, precision, opened) if cfg.hf else _from_checkpoint(cfg, precision)
        check_vocabulary(source.tokenizer, source.cfg)
        wish = Wish(
            out=Path(cfg.out),
            precision=precision,
            engine=cfg.engine,
            engine_sm=cfg.engine_sm,
            slots=cfg.slots,
            capacity=source.cfg.language.max_positions if cfg.capacity is None else cfg.capacity,
        )
        manifest = write_export(source, wish, _say)
    _say(_summary(cfg.out, manifest))


def _say(line: str) -> None:
    print(line, flush=True)


def _summary(out: str, manifest: dict[str, Any]) -> str:
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    engines = sorted({name.split("/")[1] for name in manifest["files"] if name.startswith("engines/")})
    parity = manifest["parity"]
    figures = ", ".join(f"{name} {part['max_error']:.2g}" for name, part in parity["parts"].items())
    return (
        f"wrote {out}: {manifest['precision']}, {manifest['slots']} slots of {manifest['capacity']} tokens, "
        f"{size / 1e6:,.1f} MB in {len(manifest['files'])} files"
        + (f"; engines {', '.join(engines)}" if engines else "")
        + f"\nlargest errors ({parity['note']}): {figures}"
    )


def _from_checkpoint(cfg: ExportConfig, precision: str) -> Source:
    assert cfg.checkpoint.load is not None
    folder = checkpoint.find(cfg.checkpoint.load)
    checkpoint.check(folder, None, ("weights/", "tokenizer/", "config.yaml"))
    saved = checkpoint_config(folder)
    model = model_config(saved)
    check_covered(model)
    check_exportable(model, PARTS)
    tokenizer, template = Tokenizer(folder / "tokenizer"), saved["data"]["template"]

    def load(chunks: list[nn.Module]) -> None:
        checkpoint.load_weights(folder, chunks)

    def write_words(out: Path) -> None:
        _write_words(out, model, tokenizer, template, precision)

    return Source(
        name=str(folder),
        cfg=model,
        tokenizer=tokenizer,
        template=template,
        tensors=lambda: hf_tensors(folder, model),
        reference=lambda: TorchReference(model, tokenizer.image_id, load),
        write_words=write_words,
    )


def _from_hf(cfg: ExportConfig, precision: str, opened: ExitStack) -> Source:
    assert cfg.hf is not None
    folder = HFFolder(cfg.hf)
    if folder.parts != PARTS:
        raise UserError(f"{cfg.hf} holds a {folder.architecture}, one part; export takes a whole model")
    model = model_config_of(folder)
    check_covered(model)
    words = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "tokenizer"
    import_tokenizer(folder.path, words)
    tokenizer = Tokenizer(words)
    template = (template_of(folder.path) or FAMILIES[model.family].template) if cfg.template == "auto" else cfg.template

    def tensors() -> Iterator[tuple[str, Any]]:
        return folder.hub_tensors(model)

    def load(chunks: list[nn.Module]) -> None:
        load_hf_weights(folder, chunks)

    def write_words(out: Path) -> None:
        _write_words(out, model, tokenizer, template, precision)

    return Source(
        name=str(folder.path),
        cfg=model,
        tokenizer=tokenizer,
        template=template,
        tensors=tensors,
        reference=lambda: TorchReference(model, tokenizer.image_id, load),
        write_words=write_words,
    )


def _write_words(out: Path, model: ModelConfig, tokenizer: Tokenizer, template: str, precision: str) -> None:
    """What describes the model to people and other tools, in Hugging Face's files."""
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    config = hf_config_of(model, tokenizer, dtype=dtype)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation_config(tokenizer, TEMPLATES[template]))
    write_json(out / "preprocessor_config.json", preprocessor_config(model))
    export_tokenizer(tokenizer, out, TEMPLATES[template], model.family)
