"""The chain that a person walks: stage 0, stage 1 from its checkpoint, evaluate, generate, at several layouts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import runs


@pytest.fixture(scope="module")
def stages(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stage0 and stage1, a few steps each."""
    folder = tmp_path_factory.mktemp("stages")
    common = [*runs.TINY, *runs.data_words(shards), "checkpoint.every=0"]
    runs.vlm_nemo("train", *common, f"run_dir={folder}/stage0", "trainer.steps=60", "optim.lr=0.01")
    common[0] = "recipe=shapes/stage1"
    del common[common.index(f"data.sources.instruct.path={shards}/instruct")]
    words = ["trainer.steps=4", f"checkpoint={folder}/stage0", "log.wandb=true", "log.tensorboard=true"]
    runs.vlm_nemo("train", *common, f"run_dir={folder}/stage1", *words)
    return folder


def weights(run_dir: Path) -> dict[str, object]:
    """Name -> bytes of every weight of the newest checkpoint of a one-process run."""
    step = (run_dir / "checkpoints" / "latest").read_text().strip()
    found = {}
    for file in (run_dir / "checkpoints" / step / "weights").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            index = json.loads(tensors.metadata()["chunks"])
            for name in tensors.keys():  # noqa: SIM118
                found[f"{index[name]['key']}{index[name]['offset']}"] = tensors.get_tensor(name).numpy().tobytes()
    return found


def test_stage1_moves_only_a_new_projector(stages: Path) -> None:
    before, after = weights(stages / "stage0"), weights(stages / "stage1")
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name] == after[name]) == (not name.startswith("projector")), name
    config = (stages / "stage1" / "config.yaml").read_text()
    assert "reset:\n  - projector" in config


def test_a_run_folder_holds_what_it_promises(stages: Path) -> None:
    run_dir = stages / "stage1"
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "ledger.json", "checkpoints/step_000004/manifest.json"):
        assert (run_dir / name).is_file(), name
    line = runs.metrics(run_dir)[-1]
    assert set(line) == {
        *("step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens", "samples", "tokens_per_s", "mfu"),
        *("data_wait_s", "fill", "vision_balance", "delay", "skipped", "balance_loss", "router_z_loss"),
    }
    assert 0.9 < line["fill"] <= 1 and 0 < line["delay"] < 1000
    assert (
        line["mfu"] is line["balance_loss"] is line["router_z_loss"] is None
        and line["step"] == 4
        and line["skipped"] == 0
    )
    ledger = json.loads((run_dir / "ledger.json").read_text())
    assert set(ledger) == {"seen", "used", "dropped", "sources"} and ledger["seen"] == ledger["used"]
    assert sum(m["samples"] for m in runs.metrics(run_dir)) == ledger["used"]


def test_loggers_wrote(stages: Path) -> None:
    assert list((stages / "stage1" / "tensorboard").glob("events.out.tfevents.*"))
    assert list((stages / "stage1" / "wandb").glob("offline-run-*/*.wandb"))


def test_nemo_exp_manager(stages: Path, shards: Path, tmp_path: Path) -> None:
    if "CI" not in os.environ:  # there it must run
        pytest.importorskip("nemo", reason="needs the extra [nemo]")
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", "trainer.steps=2", "log.nemo=true"]
    runs.vlm_nemo("train", *words)
    assert list((tmp_path / "nemo").rglob("events.out.tfevents.*"))
    assert (tmp_path / "nemo" / "cmd-args.log").is_file()


def scores(stages: Path, shards: Path, out: Path, *layout: str, ranks: int = 1) -> dict[str, dict[str, float]]:
    words = ["recipe=shapes/stage1", "precision=fp32", f"evaluate.data={shards}/eval", "evaluate.max_new_tokens=6"]
    words += [f"checkpoint={stages}/stage1", f"run_dir={out}", *layout]
    runs.vlm_nemo("evaluate", *words, ranks=ranks)
    return json.loads((out / "scores.json").read_text())


@pytest.fixture(scope="module")
def one_process(stages: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    found = scores(stages, shards, out)
    assert set(found) == {"accuracy", "swapped", "chance", "n"}
    assert found["n"].keys() == found["accuracy"].keys() == found["chance"].keys()
    assert {"colour", "shape", "count", "colour_unseen", "shape_unseen"} <= found["n"].keys()
    return out


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
        (2, ["parallel.context=2"]),  # two replicas
    ],
    ids=["tp2_pp2", "dp2"],
)
def test_evaluation_is_the_same_at_every_layout(
    one_process: Path, stages: Path, shards: Path, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    found = scores(stages, shards, tmp_path, *layout, ranks=ranks)
    assert found == json.loads((one_process / "scores.json").read_text())
    assert (tmp_path / "predictions.jsonl").read_text() == (one_process / "predictions.jsonl").read_text()


def test_every_form_of_a_model_answers_alike(one_process: Path, stages: Path, shards: Path, tmp_path: Path) -> None:
    """A checkpoint, its Hugging Face folder (under two tensor ranks) and its export: the same predictions."""
    runs.vlm_nemo("convert", f"checkpoint={stages}/stage1", f"out={tmp_path}/hf")
    words = [f"checkpoint={stages}/stage1", f"out={tmp_path}/export", "precision=fp32"]
    runs.vlm_nemo("export", *words)
    for form, layout, ranks in (("hf", ["parallel.tensor=2"], 2), ("export", [], 1)):
        words = [*runs.TINY, f"evaluate.data={shards}/eval", f"evaluate.{form}={tmp_path}/{form}", *layout]
        runs.vlm_nemo("evaluate", *words, f"run_dir={tmp_path}/{form}_eval", ranks=ranks)
        found = (tmp_path / f"{form}_eval" / "predictions.jsonl").read_text()
        assert found == (one_process / "predictions.jsonl").read_text(), form


def test_gallery_and_contact_sheet(one_process: Path) -> None:
    page = (one_process / "gallery.html").read_text()
    assert page.count("<figure>") == 24 and "data:image/jpeg;base64," in page
    from PIL import Image

    assert min(Image.open(one_process / "contact.png").size) > 400


def test_generate(stages: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    # What stage 1 was trained on: an image, then its caption
    words = [f"checkpoint={stages}/stage1", f"image={tmp_path}/a.png", "prompt=<image>", "infer.max_new_tokens=5"]
    alone = runs.vlm_nemo("generate", *words).stdout
    assert alone.strip()
    assert runs.vlm_nemo("generate", *words, "parallel.pipeline=2", ranks=2).stdout == alone
    runs.vlm_nemo("generate", *words[:2], "prompt=What colour is it, exactly?")
    wrong = runs.vlm_nemo("generate", *words[:2], "prompt=<image> and <image>?", code=2)
    assert wrong.stderr.strip() == "error: the prompt has 2 <image> and 1 images were given; they must be equal"


def test_bf16_trains_under_tensor_and_pipeline(shards: Path, tmp_path: Path) -> None:
    words = [*runs.TINY, *runs.data_words(shards), "precision=bf16", "trainer.steps=4", "checkpoint.every=0"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    runs.vlm_nemo("train", *words, f"run_dir={tmp_path}/one")
    runs.vlm_nemo("train", *words, f"run_dir={tmp_path}/four", *layout, ranks=4)
    one, four = (runs.metrics(tmp_path / name) for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
    assert one[-1]["loss"] < one[0]["loss"]


def test_too_many_bad_samples_stop_the_run(shards: Path, tmp_path: Path) -> None:
    """Rows of 40 tokens fit hardly any sample: one line, exit code 2, and the ledger says why."""
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", "data.pack.capacity=40", "trainer.steps=50"]
    done = runs.vlm_nemo("train", *words, code=2, ranks=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "too long" in errors[0] and "data.max_bad_fraction" in errors[0]
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["seen"] == ledger["used"] + sum(n for d in ledger["dropped"].values() for n in d.values())


THREADS_AT_EXIT = """
import atexit, sys, threading
from vlm_nemo import cli
ours = lambda: [t.name for t in threading.enumerate() if t.name.startswith("vlm_nemo")]
atexit.register(lambda: print("threads left:", ours()))
sys.exit(cli.main(sys.argv[1:]))
"""
"""`vlm-nemo`, which says at its end whether the data engine's threads are gone."""


def test_a_vocabulary_that_is_too_small(shards: Path, tmp_path: Path) -> None:
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", "model.language.vocab_size=128"]
    done = runs.vlm_nemo("train", *words, code=2)
    assert "model.language.vocab_size is 128; raise it" in done.stderr


def test_another_model_s_checkpoint_is_refused(stages: Path, shards: Path, tmp_path: Path) -> None:
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}", f"checkpoint={stages}/stage0"]
    done = runs.run(
        [sys.executable, "-c", THREADS_AT_EXIT, "train", *words, "model.language.ffn_hidden_size=96"], code=2
    )
    assert "error:" in done.stderr and "in the checkpoint but" in done.stderr
    # A thread that still decodes while the interpreter ends aborts the process (exit code -6) in some runs
    assert "threads left: []" in done.stdout


def test_another_tokenizer_s_checkpoint_is_refused(stages: Path, shards: Path, tmp_path: Path) -> None:
    """Its ids would mean other words: the run would start from noise without a word."""
    shutil.copytree(shards / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path}/run", f"checkpoint={stages}/stage0"]
    done = runs.vlm_nemo("train", *words, f"data.tokenizer={tmp_path}/tokenizer", code=2)
    assert "is not the tokenizer that" in done.stderr and "(checkpoint.reset)" in done.stderr
