"""Decoders with experts through the verbs: trained at any spread, stopped and gone on with, converted, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import runs

STEPS = 4
KINDS = {
    "qwen2_moe": [
        "model.language.qkv_bias=true",
        "model.language.moe.norm_top_k=false",
        "model.language.moe.shared_ffn_hidden_size=32",
        "model.language.moe.shared_gate=true",
        "model.language.moe.every=2",
    ],
    "qwen3_moe": [
        "model.language.qk_norm=true",
        "model.language.head_dim=32",
        "model.language.moe.top_k=3",
        "model.language.moe.dense_layers=[0]",
    ],
}
SPARSE = ["model.language.moe.experts=4", "model.language.moe.ffn_hidden_size=24", "model.language.moe.aux_loss=0.05"]
OVER_DATA = ["parallel.expert=2"]
OVER_BOTH = ["parallel.tensor=2", "parallel.expert=2", "parallel.sequence=true"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_answers(kind: str, shards: Path, tmp_path: Path) -> None:
    model = [*runs.TINY, *runs.data_words(shards), *SPARSE, *KINDS[kind]]

    def train(name: str, *more: str, ranks: int = 1) -> None:
        words = [*model, f"run_dir={tmp_path}/{name}", f"trainer.steps={STEPS}", "checkpoint.every=0", *more]
        runs.vlm_nemo("train", *words, ranks=ranks)

    train("alone")
    train("up", *OVER_DATA, "trainer.stop_at=2", ranks=2)
    train("up", *OVER_BOTH, ranks=4)
    train("down", *OVER_BOTH, "trainer.stop_at=3", ranks=4)
    train("down")
    truth = runs.metrics(tmp_path / "alone")
    for name in ("up", "down"):
        for found, true in zip(runs.metrics(tmp_path / name), truth, strict=True):
            for what in ("step", "loss", "grad_norm", "balance_loss"):
                assert found[what] == pytest.approx(true[what], rel=1e-5), (name, what)

    checkpoint = f"checkpoint={tmp_path}/up/checkpoints"
    runs.vlm_nemo("convert", checkpoint, f"out={tmp_path}/hf", "parity=true")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["text_config"]["model_type"] == kind
    parity = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert parity["max_dlogit"] < 1e-4 and parity["argmax_agreement"] == 1.0

    asked = [f"image={runs.ROOT}/docs/scene.jpg", "prompt=What shape is it?", "infer.max_new_tokens=6"]
    scored = [*model, "evaluate.limit=4", "evaluate.swap=false"]
    said, predicted = set(), set()
    for name, source, layout, ranks in (
        ("alone", checkpoint, [], 1),
        ("spread", checkpoint, OVER_BOTH, 4),
        ("hf", f"hf={tmp_path}/hf", OVER_DATA, 2),
    ):
        said.add(runs.vlm_nemo("generate", source, *asked, *layout, ranks=ranks).stdout)
        whence = source.replace("hf=", "evaluate.hf=") if name == "hf" else source
        runs.vlm_nemo("evaluate", *scored, whence, f"run_dir={tmp_path}/{name}_asked", *layout, ranks=ranks)
        predicted.add((tmp_path / f"{name}_asked" / "predictions.jsonl").read_text())
    assert len(said) == len(predicted) == 1 and said.pop().strip()
