"""What a checkpoint was trained with and what a run brings: they fit, or one line says what to change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from tests import runs


def test_a_run_does_not_go_on_with_another_tokenizer(shards: Path, tmp_path: Path) -> None:
    """Its ids would mean other words: refused on resume as on a load."""
    words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path / 'run'}", "checkpoint.every=1"]
    runs.vlm_nemo("train", *words, "trainer.steps=1")
    shutil.copytree(shards / "tokenizer", tmp_path / "other")
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    done = runs.vlm_nemo("train", *words, "trainer.steps=2", f"data.tokenizer={tmp_path / 'other'}", code=2)
    (line,) = [line for line in done.stderr.splitlines() if "is not the tokenizer that" in line]
    assert "run/checkpoints/step_000001 was trained with" in line and "start a new run (run_dir)" in line
    # The same one may lie elsewhere
    shutil.copytree(shards / "tokenizer", tmp_path / "moved")
    runs.vlm_nemo("train", *words, "trainer.steps=2", f"data.tokenizer={tmp_path / 'moved'}")


def test_what_is_written_holds_no_password(shards: Path, tmp_path: Path) -> None:
    from tests.data.http_server import serve_folder

    with serve_folder(shards) as server:
        url = server.url.replace("//", "//me:s3cret@")
        words = [*runs.TINY, *runs.data_words(shards), f"run_dir={tmp_path / 'run'}", "checkpoint.every=1"]
        words += [f"data.sources.captions.path={url}/captions?X-Amz-Signature=s3cret"]
        words += [f"data.store.cache_dir={tmp_path / 'cache'}"]
        runs.vlm_nemo("train", *words, "trainer.steps=1")
        done = runs.vlm_nemo("train", *words, "trainer.steps=2")
    assert "going on from" in done.stderr and "s3cret" not in done.stderr + done.stdout
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["data"]["sources"]["captions"]["path"] == f"{server.url}/captions"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if b"s3cret" in path.read_bytes()]
