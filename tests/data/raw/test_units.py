"""Units of every kind are plain data: a process that gets one reads the same samples, under the same fingerprint."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

from tests.data.raw.test_energon import write_energon
from tests.data.raw.test_tables import write_table
from tests.data.raw_data import picture, turns, write_img2dataset, write_llava
from vlm_nemo.data.raw.kinds import KINDS

IMAGE = picture(1)


def write(kind: str, folder: Path) -> dict[str, Path]:
    """Five samples of a kind; returns its paths."""
    pair = {"jpg": IMAGE, "txt": b"a red ring"}
    if kind == "img2dataset":
        write_img2dataset(folder, [[pair] * 5])
        return {"path": folder}
    if kind == "energon":
        write_energon(folder / "web", [[pair] * 5], "CaptioningSample", {"image": "jpg", "caption": "txt"})
        return {"path": folder / "web"}
    if kind == "llava":
        write_llava(folder, [{"image": "0.jpg", "conversations": turns("<image>", "red")}] * 5)
        (folder / "images" / "0.jpg").write_bytes(IMAGE)
        return {"json": folder / "instruct.json", "images": folder / "images"}
    if kind == "vqa":
        return {"path": write_table(folder / "t.parquet", [{"image": IMAGE, "question": "?", "answer": "red"}] * 5)}
    assert kind == "interleaved", f"{kind} has no example here"
    write_img2dataset(folder / "web", [[pair] * 5])
    rows = [{"images": [f"http://h/00000000{i}", None], "texts": [None, "red"]} for i in range(5)]
    return {"path": write_table(folder / "t.parquet", rows), "downloaded": folder / "web"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_unit_is_plain_data(tmp_path: Path, kind: str) -> None:
    where = write(kind, tmp_path)
    assert set(where) <= set(KINDS[kind].paths) and set(KINDS[kind].needed) <= set(where)
    units = KINDS[kind].list_units(where, {}, 2, map)
    assert [unit.count for unit in units] == [2, 2, 1]
    assert len({unit.fingerprint() for unit in units}) == 3
    for unit in units:
        sent = ForkingPickler.dumps(unit)  # how it goes to another process
        there = ForkingPickler.loads(sent)
        assert len(sent) < len(IMAGE) and there.fingerprint() == unit.fingerprint()
        samples = list(there.read())
        assert len(samples) == unit.count and samples == list(unit.read())
        assert all(sample.images[0].data == IMAGE for sample in samples)
