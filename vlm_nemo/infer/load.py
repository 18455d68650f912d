"""Open a model to ask it: one of our checkpoints, a Hugging Face folder, or an export bundle. Same words afterwards.

torch and megatron-core are imported only for the first two: a server of exported models needs neither.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_nemo.data.chat import TEMPLATES, Template, end_id
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.backend import Backend
from vlm_nemo.infer.config import InferConfig
from vlm_nemo.infer.engine import Engine
from vlm_nemo.infer.sampling import fresh_entropy
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

if TYPE_CHECKING:
    from vlm_nemo.infer.bundle import Bundle
    from vlm_nemo.model.config import ModelConfig
    from vlm_nemo.runtime.groups import Ranks


log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LoadedModel:
    """A model with all that a prompt to it needs."""

    name: str
    """What a server calls it."""
    tokenizer: Tokenizer
    template: Template
    spec: ImageSpec
    engine: Engine
    info: dict[str, Any]
    """backend, precision, source, context_length (tokens): what a server's metadata says"""
    ranks: Ranks | None = None
    """Where this process stands; None where no process group was started."""

    def close(self) -> None:
        """Leave the job's process groups, if there are any."""
        if self.ranks is not None:
            from vlm_nemo.runtime import groups

            groups.stop()


def open_model(
    *,
    checkpoint: str | None = None,
    hf: str | None = None,
    export: str | None = None,
    infer: InferConfig | None = None,
    parallel: ParallelConfig | None = None,
    precision: str = "auto",
    reserve: bool = False,
) -> LoadedModel:
    """Open what exactly one of checkpoint, hf and export names; every rank of the job calls it alike.

    precision: fp32 | bf16 | auto, as it was trained or exported. reserve: take the memory of the whole cache now; it
    grows with its use otherwise.
    Raises UserError for none or several sources, a damaged or unknown folder, a layout that does not fit.
    """
    given = {"checkpoint": checkpoint, "hf": hf, "export": export}
    named = [key for key, value in given.items() if value]
    if len(named) != 1:
        raise UserError(
            f"name exactly one model: checkpoint=DIR, hf=DIR or export=DIR (got {', '.join(named) or 'none'})"
        )
    infer = infer or InferConfig()
    ((form, path),) = ((key, value) for key, value in given.items() if value)
    if (found := form_of(path)) not in (None, form):
        raise UserError(f"{form}={path} holds {FORMS[found]}: write {found}={path}")
    if form == "export":
        return _open_bundle(path, infer, precision)
    layout = inference_layout(parallel or ParallelConfig())
    model = (_open_hf if form == "hf" else _open_checkpoint)(path, infer, layout, precision)
    if reserve:
        model.engine.backend.reserve()  # type: ignore[attr-defined]  # both are TorchBackends
    return model


FORMS = {"checkpoint": "a checkpoint", "hf": "a model in Hugging Face's files", "export": "an export"}


def form_of(path: str | Path) -> str | None:
    """checkpoint | hf | export, by the files of the folder; None for any other folder."""
    folder = Path(path)
    if (folder / "manifest.json").is_file() and (folder / "llm").is_dir():
        return "export"
    if (folder / "state.json").is_file() or (folder / "latest").is_file() or (folder / "checkpoints").is_dir():
        return "checkpoint"
    return "hf" if (folder / "config.json").is_file() else None


def inference_layout(parallel: ParallelConfig) -> ParallelConfig:
    """The same ranks, without what only training needs or can do; any checkpoint loads at any layout.

    Context ranks, which share a row, become replicas, which share the prompts, and each replica holds all experts.
    """
    alone = replace(parallel, virtual=1, layers=[], context=1, expert=1, sequence=False, distributed_optimizer=False)
    return replace(
        alone, recompute="none", recompute_vision="none", overlap_grad_reduce=False, overlap_param_gather=False
    )


def _open_checkpoint(path: str, infer: InferConfig, parallel: ParallelConfig, precision: str) -> LoadedModel:
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import checkpoint
    from vlm_nemo.train.origin import checkpoint_config, model_config

    step_folder = checkpoint.find(path)
    with device.adapter():
        ranks = groups.start(parallel, seed=0)
        checkpoint.check(step_folder, ranks, ("weights/", "tokenizer/", "config.yaml"))
        saved = checkpoint_config(step_folder)
        return _with_torch(
            model_config(saved),
            infer,
            parallel,
            saved["precision"] if precision == "auto" else precision,
            ranks,
            source=step_folder,
            tokenizer=Tokenizer(step_folder / "tokenizer"),
            template=saved["data"]["template"],
            load=lambda chunks: checkpoint.load_weights(step_folder, chunks),
        )


def _open_hf(path: str, infer: InferConfig, parallel: ParallelConfig, precision: str) -> LoadedModel:
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.weights.config import model_config_of
    from vlm_nemo.weights.families import FAMILIES
    from vlm_nemo.weights.hf import load_hf_weights
    from vlm_nemo.weights.hf_folder import HFFolder
    from vlm_nemo.weights.words import template_of

    folder = HFFolder(path)
    if folder.family is None:
        raise UserError(f"hf={path} holds a {folder.architecture}, which answers no questions about images alone")
    dtype = folder.dtype(folder.names()[0])
    stored = "fp32" if dtype == "float32" else "bf16"
    if dtype == "float16" and precision == "auto":
        log.warning("%s holds float16, which runs in bf16 here; precision=fp32 keeps every digit", path)
    with device.adapter():
        ranks = groups.start(parallel, seed=0)
        return _with_torch(
            model_config_of(folder),
            infer,
            parallel,
            stored if precision == "auto" else precision,
            ranks,
            source=Path(path),
            tokenizer=Tokenizer(path),
            template=template_of(folder.path) or FAMILIES[folder.family].template,
            load=lambda chunks: load_hf_weights(folder, chunks),
        )


def _with_torch(
    cfg: ModelConfig,
    infer: InferConfig,
    parallel: ParallelConfig,
    precision: str,
    ranks: Ranks,
    *,
    source: Path,
    tokenizer: Tokenizer,
    template: str,
    load: Any,
) -> LoadedModel:
    from vlm_nemo.infer.torch_backend import TorchBackend
    from vlm_nemo.model.build import build_model
    from vlm_nemo.model.layout import spec_of
    from vlm_nemo.runtime.layout import check_layout
    from vlm_nemo.train.origin import check_vocabulary

    check_layout(parallel, cfg, world_size=ranks.world)
    check_vocabulary(tokenizer, cfg)
    chunks = build_model(cfg, parallel, precision, 0, fresh=())
    load(chunks)
    capacity = min(infer.context or cfg.language.max_positions, cfg.language.max_positions)
    backend = TorchBackend(chunks[0], cfg, ranks, tokenizer.image_id, infer.slots, capacity)
    return LoadedModel(
        name=_name(source),
        tokenizer=tokenizer,
        template=TEMPLATES[template],
        spec=spec_of(cfg),
        engine=_engine(backend, tokenizer, TEMPLATES[template], infer, _shared_entropy(ranks)),
        info=_info("torch", precision, source, capacity),
        ranks=ranks,
    )


def _open_bundle(path: str, infer: InferConfig, precision: str) -> LoadedModel:
    from vlm_nemo.infer.bundle import open_bundle

    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"an export runs in one process, not {world}; checkpoint=DIR and hf=DIR run in several")
    bundle = open_bundle(path)
    if precision not in ("auto", bundle.precision):
        raise UserError(
            f"export={path} is {bundle.precision}, not precision={precision}; export again, or leave it out"
        )
    tokenizer = Tokenizer(path)
    runtime, backend = _runtime(bundle, infer)
    return LoadedModel(
        name=_name(Path(path)),
        tokenizer=tokenizer,
        template=TEMPLATES[bundle.template],
        spec=bundle.image,
        engine=_engine(backend, tokenizer, TEMPLATES[bundle.template], infer),
        info=_info(runtime, bundle.precision, Path(path), backend.capacity),
    )


def _runtime(bundle: Bundle, infer: InferConfig) -> tuple[str, Backend]:
    """What runs the bundle, by name: what was asked for, else an engine that fits this machine's GPU, else ONNX
    Runtime."""
    from vlm_nemo.infer.onnx_backend import OnnxBackend, has_cuda
    from vlm_nemo.infer.tensorrt_backend import TensorRTBackend

    slots = min(infer.slots, bundle.slots)
    if infer.runtime not in ("auto", "onnxruntime"):
        return infer.runtime, TensorRTBackend(bundle, infer.runtime, slots=slots)
    for compiler in sorted({engines.backend for engines in bundle.engines()}) if infer.runtime == "auto" else ():
        try:
            return compiler, TensorRTBackend(bundle, compiler, slots=slots)
        except (UserError, RuntimeError) as why:
            log.warning("%s; ONNX Runtime answers instead", why)
    return "onnxruntime", OnnxBackend(bundle, slots=slots, device="cuda" if has_cuda() else "cpu")


def _engine(
    backend: Backend,
    tokenizer: Tokenizer,
    template: Template,
    infer: InferConfig,
    entropy: Callable[[], int] = fresh_entropy,
) -> Engine:
    ends = {tokenizer.eos_id, end_id(tokenizer, template)}
    return Engine(backend, tokenizer, prefill_tokens=infer.prefill_tokens, ends=ends, entropy=entropy)


def _shared_entropy(ranks: Ranks) -> Callable[[], int]:
    """Seeds of answers that were given none: as random as ever, and the same on every rank."""
    if ranks.world == 1:
        return fresh_entropy
    import torch.distributed as dist

    box = [fresh_entropy()]
    dist.broadcast_object_list(box, src=0)
    numbers = random.Random(box[0])
    return lambda: numbers.getrandbits(63)


def _info(backend: str, precision: str, source: Path, capacity: int) -> dict[str, Any]:
    return {"backend": backend, "precision": precision, "source": str(source), "context_length": capacity}


def _name(source: Path) -> str:
    """runs/demo/stage3/checkpoints/step_002100 -> stage3; models/llava-1.5-7b-hf -> llava-1.5-7b-hf."""
    for part in reversed(source.resolve().parts):
        if not part.startswith("step_") and part not in ("checkpoints", "export"):
            return part
    return "model"
