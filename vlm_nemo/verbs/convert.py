"""`vlm-nemo convert`: Hugging Face's folders to a checkpoint of ours, and back."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import yaml

from vlm_nemo.config import ConvertRoot
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.parts import flat, home, part_values
from vlm_nemo.train import checkpoint, tensors
from vlm_nemo.train.origin import checkpoint_config, model_config
from vlm_nemo.types import UserError
from vlm_nemo.weights import parity
from vlm_nemo.weights.from_hf import MODEL_PART, to_checkpoint
from vlm_nemo.weights.hf_folder import HFFolder
from vlm_nemo.weights.to_hf import to_folder

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEW = 3
"""Other values than a model of ours has that are named as words; more of them are another model."""


def convert(cfg: ConvertRoot) -> None:
    """Whichever way the words say; prints what became of what."""
    if cfg.max_shard_gb <= 0:
        raise UserError(f"max_shard_gb={cfg.max_shard_gb} must be above 0")
    _check_parity(cfg)
    dtype, max_bytes, out = DTYPES[cfg.dtype], int(cfg.max_shard_gb * 1e9), Path(cfg.out)
    if cfg.hf:
        if cfg.part != "all":
            raise UserError(f"part={cfg.part} is for checkpoint=DIR; a folder of hf= gives all the parts that it has")
        to_checkpoint(
            cfg.hf,
            out,
            dtype=dtype,
            max_bytes=max_bytes,
            feature_layer=cfg.feature_layer,
            template=None if cfg.template == "auto" else cfg.template,
            say=print,
        )
        if line := how_to_train(out):
            print(line)
        if cfg.parity:
            _parity(Path(cfg.hf[0]), out, out, cfg.image)
        return
    assert cfg.checkpoint.load is not None
    step_folder = checkpoint.find(cfg.checkpoint.load)
    saved = checkpoint_config(step_folder)
    to_folder(
        step_folder,
        model_config(saved),
        saved["data"]["template"],
        out,
        part=None if cfg.part == "all" else cfg.part,
        dtype=dtype,
        max_bytes=max_bytes,
        say=print,
    )
    if cfg.parity:
        _parity(out, step_folder, out, cfg.image)


def how_to_train(out: Path) -> str | None:
    """The words by which a training goes on from `out`; None where it lacks the tower or the decoder."""
    saved = checkpoint_config(out)
    lacking = [part for part in PARTS if part not in tensors.Reader(out / "weights").parts()]
    if lacking not in ([], ["projector"]):
        return None
    folder = quote(str(out))
    words = f"data.tokenizer={folder}/tokenizer data.template={saved['data']['template']} checkpoint={folder}"
    words += " checkpoint.reset=[projector]" if lacking else ""
    name, differing = nearest_model(saved["model"])
    if len(differing) > FEW:
        return (
            f"its model is none of ours: copy {out}/{MODEL_PART} to conf/model/NAME.yaml of your folder and train it "
            f"with model=NAME {words}"
        )
    more = [f"model.{key}={_word(value)}" for key, value in differing.items()]
    return " ".join([f"train it with model={name}", *more, words])


def nearest_model(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(the model of ours that differs least, where the given one has other values: {"language.vocab_size": 32128})"""
    usual = flat(asdict(ModelConfig()))
    given = {key: value for key, value in flat(model).items() if key not in ("init_std", "vision.position_init_std")}
    found = {}
    for path in sorted((home() / "conf" / "model").glob("*.yaml")):
        ours = {**usual, **part_values("model", path.stem)}
        found[path.stem] = {key: value for key, value in given.items() if value != ours.get(key)}
    name = min(found, key=lambda name: len(found[name]))
    return name, found[name]


def _word(value: Any) -> str:
    """As one types it after `key=`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.strip().removesuffix("...").strip().replace(", ", ",")


def _check_parity(cfg: ConvertRoot) -> None:
    """Before anything is written. Raises UserError."""
    if not cfg.parity:
        if cfg.image is not None:
            raise UserError(f"image={cfg.image} is for parity=true")
        return
    if cfg.part != "all" or len(cfg.hf) > 1 or (cfg.hf and HFFolder(cfg.hf[0]).family is None):
        raise UserError("parity=true compares whole models; a part alone answers no questions about images")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("parity=true needs transformers: pip install 'transformers>=5,<6'")
    if cfg.image is not None and not Path(cfg.image).is_file():
        raise UserError(f"image={cfg.image} is no file")


def _parity(hf: Path, step_folder: Path, out: Path, image: str | None) -> None:
    saved = checkpoint_config(step_folder)
    found = parity.report(
        hf,
        model_config(saved),
        Tokenizer(step_folder / "tokenizer"),
        saved["data"]["template"],
        lambda chunks: checkpoint.load_weights(step_folder, chunks),
        Path(image).read_bytes() if image else None,
    )
    print(parity.write(found, out))
