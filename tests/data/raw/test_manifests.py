"""Every data set's folder: its manifest is composed, and its README says where it is from and what to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_nemo.data.prepare.run import read_manifest
from vlm_nemo.data.raw.kinds import KINDS

DATA = Path(__file__).parents[3] / "data"
FOLDERS = sorted(path.parent for path in DATA.glob("*/manifest.yaml"))


def test_there_is_one_for_each_kind() -> None:
    assert {"cc3m", "laion", "llava_pretrain", "llava_instruct", "obelics", "vqa", "energon"} <= {
        f.name for f in FOLDERS
    }
    assert {source.kind for folder in FOLDERS for source in read_manifest(folder / "manifest.yaml")} == set(KINDS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_data_set_is_whole(folder: Path) -> None:
    sources = read_manifest(folder / "manifest.yaml", "/root")
    assert sources and all(path.is_relative_to("/root") for source in sources for path in source.where.values())
    readme = (folder / "README.md").read_text()
    assert f"vlm-nemo prepare data/{folder.name}/manifest.yaml" in readme
    for source in sources:
        assert set(KINDS[source.kind].needed) <= set(source.where)
