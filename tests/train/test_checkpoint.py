"""Checkpoints appear whole or not at all, are checked when they are read, and hold no pickle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from vlm_nemo.model.build import build_model
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train import checkpoint, manifest, tensors
from vlm_nemo.types import UserError


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with device.adapter():
        yield groups.start(ParallelConfig(), seed=0)
        groups.stop()


def model(seed: int) -> list[VLM]:
    return build_model(tiny.tiny_model(), ParallelConfig(), "fp32", seed)


def extras(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}\n")


def save(folder: Path, step: int, ranks: Ranks, keep: int = 0) -> Path:
    """A checkpoint whose weights are a function of the step."""
    return checkpoint.save(
        folder,
        step,
        ranks=ranks,
        chunks=model(step),
        optimizer=None,
        state={"updates": step},
        write_extras=extras,
        keep=keep,
    )


def holds(path: Path, step: int, ranks: Ranks) -> bool:
    found, expected = model(999), model(step)
    checkpoint.load_weights(path, found)
    pairs = zip(found[0].parameters(), expected[0].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_round_trip_find_and_prune(tmp_path: Path, ranks: Ranks) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step, ranks, keep=2)
    assert [p.name for p in checkpoint.newest(tmp_path / "checkpoints")] == ["step_000003", "step_000002"]
    for spelled in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "latest"):
        assert checkpoint.find(spelled).name == "step_000003"
    assert checkpoint.find(tmp_path / "checkpoints" / "step_000002").name == "step_000002"
    assert holds(tmp_path / "checkpoints" / "step_000003", 3, ranks)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.find(tmp_path / "nothing")


def test_only_plain_files(tmp_path: Path, ranks: Ranks) -> None:
    path = save(tmp_path, 1, ranks)
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".yaml", ".safetensors"}


class Crash(Exception):
    """Power fails here."""


@pytest.mark.parametrize("point", [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18])
def test_a_crash_at_any_point_leaves_a_checkpoint_that_loads(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Stop at the n-th thing that a second save does to the file system: the first or the second is there, whole."""
    save(tmp_path, 1, ranks, keep=1)
    done = 0

    def crashing(original):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal done
            done += 1
            if done > point:
                raise Crash
            return original(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in (
            (tensors, "write"),
            (manifest, "write_json"),
            (Path, "rename"),
            (Path, "replace"),
            (manifest, "sync"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, crashing(getattr(owner, name)))
        try:
            save(tmp_path, 2, ranks, keep=1)
        except (Crash, RuntimeError):
            pass
    found = checkpoint.find(tmp_path)
    assert checkpoint.verify(found) == []
    assert holds(found, int(found.name[-1]), ranks)
    save(tmp_path, 3, ranks, keep=1)  # what the crash left does not stand in the way
    assert checkpoint.find(tmp_path).name == "step_000003"


@pytest.mark.parametrize("fault", ["bit flip", "cut", "missing"])
def test_damage_is_named(tmp_path: Path, ranks: Ranks, fault: str) -> None:
    path = save(tmp_path, 1, ranks)
    file = path / "weights" / "language_00000.safetensors"
    data = bytearray(file.read_bytes())
    if fault == "bit flip":
        data[-5] ^= 4
        file.write_bytes(data)
    elif fault == "cut":
        file.write_bytes(data[:-8])
    else:
        file.unlink()
    assert checkpoint.verify(path) == ["weights/language_00000.safetensors"]
    with pytest.raises(UserError, match=r"damaged: weights/language_00000.safetensors; use an earlier step"):
        checkpoint.check(path, ranks)


def test_another_model_is_refused_by_name_and_shape(tmp_path: Path, ranks: Ranks) -> None:
    path = save(tmp_path, 1, ranks)
    wider = tiny.tiny_model()
    wider.language.ffn_hidden_size = 96
    with pytest.raises(UserError, match=r"mlp.linear_fc1.weight is \[96, 32\] in the checkpoint but \[192, 32\]"):
        checkpoint.load_weights(path, build_model(wider, ParallelConfig(), "fp32", 0))


@pytest.mark.parametrize("content", ["{", "[]", '{"files": []}', '{"files": [{"file": "state.json"}]}'])
def test_a_damaged_manifest_is_damage(tmp_path: Path, ranks: Ranks, content: str) -> None:
    path = save(tmp_path, 1, ranks)
    (path / "manifest.json").write_text(content)
    assert checkpoint.verify(path, ranks) == ["manifest.json"]
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.resumable(tmp_path, ranks)


def test_resumable_sets_the_damaged_one_aside(tmp_path: Path, ranks: Ranks) -> None:
    assert checkpoint.resumable(tmp_path, ranks) is None
    save(tmp_path, 1, ranks)
    (save(tmp_path, 2, ranks) / "config.yaml").unlink()
    found = checkpoint.resumable(tmp_path, ranks)
    assert found is not None and found.path.name == "step_000001"
    assert (tmp_path / ".step_000002.damaged").is_dir() and not (tmp_path / "step_000002").exists()


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    """Its patches would be read in the wrong order, without a word."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_text("x")
    (tmp_path / "state.json").write_text("{}")
    checkpoint.write_manifest(tmp_path)
    assert checkpoint.verify(tmp_path) == []
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match="checkpoint of format 1, this version reads 2: .* vlm-nemo convert"):
        checkpoint.verify(tmp_path)
