"""A folder loads at any tensor x pipeline layout: what the ranks then hold together is the folder, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.weights import twins
from tests.weights.test_round_trip import convert, hub_state, same, state
from vlm_nemo.model.build import build_model
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import checkpoint, tensors
from vlm_nemo.train.origin import checkpoint_config, model_config
from vlm_nemo.weights.hf import load_hf_weights
from vlm_nemo.weights.hf_folder import HFFolder

Case = tuple[int, int, bool]
"""tensor, pipeline, straight from the folder (or from the checkpoint made of it)"""


def load_and_save(folder: str, cases: list[Case]) -> None:
    """Fill a model at each layout and save it at that layout."""
    ours = Path(folder) / "ours"

    def extras(draft: Path) -> None:
        shutil.copy(ours / "config.yaml", draft)
        shutil.copytree(ours / "tokenizer", draft / "tokenizer")
        tensors.write(draft / "weights" / tensors.UNUSED_FILE, tensors.read_unused(ours / "weights"))

    with device.adapter():
        for tensor, pipeline, straight in cases:
            parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
            ranks = groups.start(parallel, seed=0)
            chunks = build_model(model_config(checkpoint_config(ours)), parallel, "fp32", seed=5)
            if straight:
                load_hf_weights(HFFolder(Path(folder) / "hf"), chunks)
            else:
                checkpoint.load_weights(ours, chunks)
            checkpoint.save(
                Path(folder) / f"saved{tensor}{pipeline}{straight}",
                1,
                ranks=ranks,
                chunks=chunks,
                optimizer=None,
                state={"updates": 0},
                write_extras=extras,
                keep=0,
            )
        groups.stop()


@pytest.mark.parametrize(
    ("cases", "tied"),
    [
        ([(1, 1, True)], False),
        ([(2, 1, True), (1, 2, True), (1, 2, False)], False),
        ([(2, 2, True), (2, 2, False)], True),
    ],
)
def test_any_layout_holds_the_folder(tmp_path: Path, cases: list[Case], tied: bool) -> None:
    twins.llava(tmp_path / "hf", text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    convert(f"hf={tmp_path}/hf", f"out={tmp_path}/ours")
    run_ranks(load_and_save, cases[0][0] * cases[0][1], str(tmp_path), cases)
    for tensor, pipeline, straight in cases:
        name = f"{tensor}{pipeline}{straight}"
        convert(f"checkpoint={tmp_path}/saved{name}", f"out={tmp_path}/back{name}")
        same(hub_state(tmp_path / "hf"), state(tmp_path / f"back{name}"))
        config = json.loads((tmp_path / f"back{name}" / "config.json").read_text())
        assert config["vision_feature_layer"] == -2
