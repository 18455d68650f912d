"""prepare that is killed, or finds the disk full, or another one at work: what it leaves, and how it goes on."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors import SafetensorError

from tests.data.raw_data import good_rows, picture, write_img2dataset, write_llava, write_manifest
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare import source
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.runtime.lock import folder_lock
from vlm_nemo.types import UserError

RUN = """
import sys
from vlm_nemo.data.prepare import measure, pool, source
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare.run import prepare
if __name__ == "__main__":
    pool.PARALLEL_SAMPLES = 1
    source.SAVE_SECONDS = measure.SAVE_SECONDS = 0.0
    manifest, out, workers = sys.argv[1:]
    prepare(PrepareConfig(manifest=manifest, out=out, workers=int(workers), shard_samples=4, tokenizer_vocab=300))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    pairs = [{"jpg": picture(i % 7), "txt": f"{i} red circles".encode()} for i in range(120)]
    write_img2dataset(tmp_path / "captions", [pairs[:60], pairs[60:]])
    write_llava(tmp_path, good_rows(200))
    manifest = write_manifest(tmp_path)
    manifest.write_text(manifest.read_text().replace("path: captions}", "path: captions, drop_duplicates: true}"))
    prepare(
        PrepareConfig(
            manifest=str(manifest), out=str(tmp_path / "whole"), workers=1, shard_samples=4, tokenizer_vocab=300
        )
    )
    out = tmp_path / "out"
    rng = random.Random(0)
    for workers in (2, 1):
        command = [sys.executable, "-c", RUN, str(manifest), str(out), str(workers)]
        before = len(list(out.rglob("*.safetensors")))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while len(list(out.rglob("*.safetensors"))) <= before and process.poll() is None:
                assert time.monotonic() < deadline, "nothing was written"
                time.sleep(0.001)
            time.sleep(rng.random() * 0.15)
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, "processes outlive their parent and go on writing"
    prepare(PrepareConfig(manifest=str(manifest), out=str(out), workers=1, shard_samples=4, tokenizer_vocab=300))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_second_prepare_is_refused(tmp_path: Path) -> None:
    write_llava(tmp_path, good_rows(5))
    manifest = write_manifest(tmp_path, ("instruct",))
    cfg = PrepareConfig(manifest=str(manifest), out=str(tmp_path / "out"), workers=1)
    hold = (
        "import sys, time; from pathlib import Path; from vlm_nemo.runtime.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1]), 'out'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is being written by process {other.pid}"):
            prepare(cfg)
        other.kill()
    prepare(cfg)
    with folder_lock(tmp_path / "out", "out"):
        pass


@pytest.mark.parametrize("name", ["00001.tar.part", "manifest.json.part"])
def test_a_full_disk_is_one_clear_error_and_room_mends_it(tmp_path: Path, name: str) -> None:
    write_llava(tmp_path, good_rows(12))
    manifest = write_manifest(tmp_path, ("instruct",))
    cfg = PrepareConfig(manifest=str(manifest), out=str(tmp_path / "out"), workers=1, shard_samples=4)
    full = tmp_path / "out" / "instruct" / name
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no space left for out=.*; make room and run the same command again"):
        prepare(cfg)
    full.unlink(missing_ok=True)
    assert prepare(cfg)["instruct"]["records"] == 12
    assert not list((tmp_path / "out").rglob("*.part"))


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llava(tmp_path, good_rows(4))
    manifest = write_manifest(tmp_path, ("instruct",))
    cfg = PrepareConfig(manifest=str(manifest), out=str(tmp_path / "out"), workers=1)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr("vlm_nemo.data.storage.write.save_file", full)
        prepare(cfg)
    assert prepare(cfg)["instruct"]["records"] == 4


def test_a_run_that_cannot_come_below_its_limit_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MANY", 8)
    write_llava(tmp_path, [{"id": i} for i in range(40)] + good_rows(40))
    manifest = write_manifest(tmp_path, ("instruct",))
    cfg = PrepareConfig(manifest=str(manifest), out=str(tmp_path / "out"), workers=1, shard_samples=4)
    with pytest.raises(UserError, match=r"12 of 12 samples of source instruct had to be dropped: 12 bad json"):
        prepare(cfg)
    assert len(list((tmp_path / "out").rglob("*.tar"))) == 3
    manifest.write_text(manifest.read_text().replace("images: images}", "images: images, max_bad_fraction: 0.5}"))
    assert prepare(cfg)["instruct"]["dropped"] == {"bad json": 40}


def test_a_source_may_have_its_own_limit(tmp_path: Path) -> None:
    write_llava(tmp_path, [{"id": i} for i in range(4)] + good_rows(40))
    manifest = write_manifest(tmp_path, ("instruct",))
    manifest.write_text(manifest.read_text().replace("images: images}", "images: images, max_bad_fraction: 0.05}"))
    given = {"manifest": str(manifest), "out": str(tmp_path / "out"), "workers": 1, "max_bad_fraction": 0.5}
    cfg = PrepareConfig(**given, min_samples_before_stop=10)
    with pytest.raises(UserError, match=r"more than sources\.instruct\.max_bad_fraction=0\.05"):
        prepare(cfg)
