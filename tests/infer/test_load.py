"""Opening a model: which one is meant, what does not fit, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_nemo import cli
from vlm_nemo.infer.config import InferConfig
from vlm_nemo.infer.load import form_of, inference_layout, open_model
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


def test_exactly_one_model() -> None:
    for given in ({}, {"hf": "a", "export": "b"}):
        with pytest.raises(UserError, match="name exactly one model"):
            open_model(**given)


def test_a_folder_under_the_wrong_word(exported: Path, llava_twin: tuple[Path, Any], tmp_path: Path) -> None:
    hf = llava_twin[0]
    assert cli.main(["convert", f"hf={hf}", f"out={tmp_path}/start"]) == 0
    assert [form_of(p) for p in (exported, hf, tmp_path / "start", tmp_path)] == ["export", "hf", "checkpoint", None]
    with pytest.raises(UserError, match=f"checkpoint={exported} holds an export: write export={exported}"):
        open_model(checkpoint=str(exported))
    with pytest.raises(UserError, match="holds a checkpoint: write checkpoint="):
        open_model(hf=str(tmp_path / "start"))
    with pytest.raises(UserError, match="holds a model in Hugging Face's files: write hf="):
        open_model(export=str(hf))


def test_an_export_has_its_own_process_and_precision(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is fp32, not precision=bf16"):
        open_model(export=str(exported), precision="bf16")
    model = open_model(export=str(exported), infer=InferConfig(slots=64))
    assert model.engine.backend.slots == 4, "the bundle's"
    assert (model.info["backend"], model.info["precision"], model.info["context_length"]) == ("onnxruntime", "fp32", 48)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="an export runs in one process, not 2"):
        open_model(export=str(exported))


def test_the_command_line_says_so_before_anything_starts(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["serve", f"export={exported}", "--validate"]) == 2
    assert "an export runs in one process, not 2" in capsys.readouterr().err


def test_a_tokenizer_with_more_words_than_the_model(llava_twin: tuple[Path, Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "hf"
    shutil.copytree(llava_twin[0], folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzzz"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer has 401 tokens but model.language.vocab_size is 320"):
        open_model(hf=str(folder))


def test_an_image_that_cannot_be_decoded_is_no_empty_answer(
    llava_twin: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture at all, not one bit of it")
    assert cli.main(["generate", f"hf={llava_twin[0]}", f"image={tmp_path}/bad.jpg", "prompt=hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: no answer: broken image")


def test_a_layout_of_training_answers_without_what_only_training_does() -> None:
    """Context ranks share rows; where there are none to share they are replicas."""
    trained = ParallelConfig(tensor=2, pipeline=2, virtual=2, context=2, sequence=True, recompute="full")
    assert inference_layout(trained) == ParallelConfig(tensor=2, pipeline=2, distributed_optimizer=False)
