"""Write an export: graphs, weights, checks, parity report, engines, and last the manifest that makes it one.

Everything is made in a draft folder, which gets its name only when all of it is good.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

import vlm_nemo
from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.export import parity, tensorrt
from vlm_nemo.export.covered import check_covered
from vlm_nemo.export.gate import check_graph
from vlm_nemo.export.graph import OPSET
from vlm_nemo.export.language_graph import EMBEDDING, language_graph
from vlm_nemo.export.parity import Case, Measured
from vlm_nemo.export.reference import Reference
from vlm_nemo.export.tensors import TensorFile, embedding_file, fill
from vlm_nemo.export.vision_graph import vision_graph
from vlm_nemo.infer.bundle import FORMAT, MANIFEST, read_manifest, sha256
from vlm_nemo.infer.onnx_backend import OnnxBackend
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.types import UserError
from vlm_nemo.weights.shards import new_folder, write_json
from vlm_nemo.weights.tables import check_unused

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model to export, wherever it comes from."""

    name: str
    """What the manifest says it was."""
    cfg: ModelConfig
    tokenizer: Tokenizer
    template: str
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    """Its tensors under hub names, one at a time."""
    reference: Callable[[], Reference]
    """The model to compare with; built when its turn comes."""
    write_words: Callable[[Path], None]
    """Writes config.json, generation_config.json, preprocessor_config.json, the tokenizer and its chat template."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be written."""

    out: Path
    precision: str
    engine: str
    engine_sm: Sequence[int]
    slots: int
    capacity: int


def write_export(source: Source, wish: Wish, say: Say) -> dict[str, Any]:
    """Write the export and return its manifest.

    Raises UserError for a model that the graphs cannot say, sizes that do not fit, tensors that do not, a failed parity
    (the report then lies beside `out` as <out>.parity.json) and what an engine's builder refuses.
    """
    check_covered(source.cfg)
    longest = source.cfg.language.max_positions
    if not 1 <= wish.slots or not 2 <= wish.capacity <= longest:
        raise UserError(
            f"slots={wish.slots} must be at least 1, and capacity={wish.capacity} between 2 and {longest}, the model's "
            "model.language.max_positions"
        )
    backend = capabilities = None
    if wish.engine != "none":  # before minutes are spent on the graphs
        backend = tensorrt.load_backend(wish.engine)
        capabilities = tensorrt.capabilities(backend, wish.engine_sm)
    with new_folder(wish.out) as draft:
        source.write_words(draft)
        twin = draft / "twin" if wish.precision == "bf16" else None
        _write_graphs(source, wish, draft, twin, say)
        manifest = _describe(source, wish, draft)
        write_json(draft / MANIFEST, manifest)
        manifest["parity"] = _check_parity(source, wish, draft, twin, say)
        if twin is not None:
            shutil.rmtree(twin)
        if backend is not None:
            bundle = read_manifest(draft)
            for capability in capabilities or ():
                tensorrt.build_engines(backend, bundle, capability, say)
            manifest["versions"][wish.engine] = backend.__version__
        files = sorted(p for p in draft.rglob("*") if p.is_file() and p.name != MANIFEST)
        manifest["files"] = {
            p.relative_to(draft).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
        }
        write_json(draft / MANIFEST, manifest)
    return manifest


def _write_graphs(source: Source, wish: Wish, draft: Path, twin: Path | None, say: Say) -> None:
    """Both graphs (and both of the twin's) from one pass over the weights; each through the gate."""
    cfg = source.cfg
    graphs, files = [], []
    for folder, precision in ((draft, wish.precision), (twin, "fp32")):
        if folder is None:
            continue
        vision = TensorFile(path=folder / "vision" / "model.onnx.data", precision=precision)
        language = TensorFile(path=folder / "llm" / "model.onnx.data", precision=precision)
        graphs += [vision_graph(cfg, vision), language_graph(cfg, language, wish.capacity)]
        shape = (cfg.language.vocab_size, cfg.language.hidden_size)
        files += [vision, language, embedding_file(folder / "embedding.safetensors", EMBEDDING, shape, precision)]
    say(f"writing {sum(f.end for f in files) / 1e6:,.1f} MB of weights" + (" (with an fp32 twin)" if twin else ""))
    fill(files, source.tensors(), lambda name: check_unused([name], cfg))
    for graph in graphs:
        graph.save()
    for folder in (draft, twin):
        if folder is not None:
            check_graph(folder / "vision" / "model.onnx", None)
            check_graph(folder / "llm" / "model.onnx", cfg.language.num_layers)
    if twin is not None:
        for name in ("vision", "llm"):
            parity.check_twins(draft / name / "model.onnx", twin / name / "model.onnx")
    say(f"wrote and checked vision/model.onnx and llm/model.onnx: opset {OPSET}, {wish.precision}")


def _describe(source: Source, wish: Wish, draft: Path) -> dict[str, Any]:
    """The manifest, but for the parity report and the files."""
    v, lang = source.cfg.vision, source.cfg.language
    spec = spec_of(source.cfg)
    return {
        "format": FORMAT,
        "source": source.name,
        "versions": {
            "vlm_nemo": vlm_nemo.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "opset": OPSET,
        "precision": wish.precision,
        "slots": wish.slots,
        "capacity": wish.capacity,
        "template": source.template,
        "image_token": source.tokenizer.image_id,
        "image": {
            "size": spec.size,
            "patch": spec.patch,
            "class_token": spec.class_token,
            "tokens": view_tokens(spec, spec.grid),
            "layout": asdict(spec.layout),
            "mean": list(v.mean),
            "std": list(v.std),
            "normalised": "inside the vision graph",
        },
        "model": {
            "layers": lang.num_layers,
            "kv_heads": lang.num_kv_heads,
            "head_size": lang.hidden_size // lang.num_heads,
            "hidden_size": lang.hidden_size,
            "vocab_size": lang.vocab_size,
        },
        "io": {name: _io(draft / name / "model.onnx") for name in ("vision", "llm")},
        "profiles": {
            "vision": {"images": {"N": [1, tensorrt.IMAGE_BATCH]}},
            "llm": {
                "prefill": {"B": [1, 1], "S": [1, wish.capacity]},
                "decode": {"B": [1, wish.slots], "S": [1, 1]},
            },
        },
        "parity": {},
        "files": {},
    }


def _io(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Names, types and shapes of a graph's inputs and outputs, as the graph has them."""

    def described(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        return {
            "name": value.name,
            "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
            "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim],
        }

    graph = onnx.load(path, load_external_data=False).graph
    return {"inputs": [described(i) for i in graph.input], "outputs": [described(o) for o in graph.output]}


def _check_parity(source: Source, wish: Wish, draft: Path, twin: Path | None, say: Say) -> dict[str, Any]:
    """Run what a CPU can run against the model; parity.json and golden/. Raises UserError over a limit."""
    bundle = read_manifest(draft)
    say("comparing with the model in torch")
    reference = source.reference()
    cases = parity.make_cases(reference, bundle, source.tokenizer.vocab_size, source.cfg.language.max_positions)
    ran = bundle if twin is None else bundle.at(twin, "fp32")
    backend = OnnxBackend(ran, slots=len(cases))
    found = parity.measure(backend, reference, cases, ran.precision)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    report = parity.report(found, precision=wish.precision, ran=ran.precision, versions=versions)
    for name, part in found.items():
        say(f"parity {name}: {_figures(part)}")
    if failure := parity.first_failure(found):
        kept = wish.out.with_name(f"{wish.out.name}.parity.json")
        write_json(kept, report)
        raise UserError(f"{failure}; nothing was written but {kept}")
    write_json(draft / "parity.json", report)
    _write_golden(draft / "golden", cases)
    return report


def _figures(part: Measured) -> str:
    agreement = "" if part.argmax_equal is None else f", likeliest token equal in {part.argmax_equal:.1%}"
    return f"largest error {part.max_error:.2g} of {part.limit:.2g} allowed, over {part.steps} steps{agreement}"


def _write_golden(folder: Path, cases: Sequence[Case]) -> None:
    """Inputs and the model's logits, for a check on a device that has no torch."""
    folder.mkdir()
    for i, case in enumerate(cases):
        np.savez(
            folder / f"case_{i}.npz",
            tokens=case.tokens,
            prompt=np.int64(case.prompt),
            images=case.images,
            logits=case.logits,
        )
