"""What counts as a sample of a tar."""

from __future__ import annotations

import tarfile
from pathlib import Path

from tests.data.raw_data import add_member
from vlm_nemo.data.raw.tar import count_tar, read_members, scan_tar


def test_members_are_grouped_by_their_name_up_to_the_first_dot(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/1.seg.png", "a/2.JPG", "b.c/1.txt", "README", "__index__/x.txt", "a/__meta__"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            add_member(archive, name, name.encode())
    groups = scan_tar(tmp_path / "x.tar")
    assert [(key, list(members)) for key, members in groups] == [
        ("a/1", ["jpg", "seg.png"]),
        ("a/2", ["jpg"]),
        ("b.c/1", ["txt"]),
    ]
    assert count_tar(tmp_path / "x.tar") == 3
    contents = dict(read_members(tmp_path / "x.tar", groups, ("jpg",)))
    assert contents == {"a/1": {"jpg": b"a/1.jpg"}, "a/2": {"jpg": b"a/2.JPG"}, "b.c/1": {}}
