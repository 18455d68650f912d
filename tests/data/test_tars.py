"""One pass over a tar, for raw data and for shards: no damage goes unseen."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.data.raw_data import add_member
from vlm_nemo.data.raw.tar import scan_tar
from vlm_nemo.data.storage.store import LocalStore
from vlm_nemo.data.tars import ReadAhead, members
from vlm_nemo.types import UserError

READERS: dict[str, Callable[[Path], list[int]]] = {
    "prepare": lambda tar: [size for _, group in scan_tar(tar) for _, size in group.values()],
    "store": lambda tar: [member.size for member in members(LocalStore(tar.parent).open(tar.name))],
    "remote": lambda tar: [member.size for member in members(ReadAhead(LocalStore(tar.parent).open(tar.name)))],
}
"""Whoever looks through a tar: sizes of its members."""


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_goes_unseen(reader: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere, with any byte of a header changed or a header gone, a tar gives all its members or an error."""
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    sizes = data.draw(st.lists(st.integers(0, 1500), min_size=1, max_size=6))
    with tarfile.open(path, "w") as archive:
        for i, size in enumerate(sizes):
            add_member(archive, f"{i}.txt", b"x" * size)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in archive)
    how = data.draw(st.sampled_from(["cut", "changed", "gone"]))
    if how == "cut":
        cut = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:cut])
        harmless = cut >= end + 512  # only some of the zeros that fill the last record are gone
    else:
        # Before nothing but zeros, a header that became zeros is the tar's end by all that can be seen
        header = data.draw(st.sampled_from(headers))
        assume(how == "changed" or any(whole[header + 512 :]))
        place = data.draw(st.integers(0, 511))
        changed = bytearray(whole)
        if how == "changed":
            changed[header + place] ^= data.draw(st.integers(1, 255))
        else:
            changed[header : header + 512] = bytes(512)
        path.write_bytes(changed)
        harmless = how == "changed" and 154 <= place < 156  # what follows the digits of the checksum
    try:
        found = READERS[reader](path)
    except UserError as error:
        assert "0.tar is damaged" in str(error)
    else:
        assert harmless and found == sizes
