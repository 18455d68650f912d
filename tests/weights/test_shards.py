"""Files of a bounded size from a stream of any length, and folders that are whole or not there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm_nemo.types import UserError
from vlm_nemo.weights.shards import INDEX, new_folder, write_hf


def test_one_file_s_worth_is_in_memory(tmp_path: Path) -> None:
    live, most = 0, 0

    def freed() -> None:
        nonlocal live
        live -= 400

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal live, most
        for n in range(20):
            tensor = torch.full((100,), float(n))
            weakref.finalize(tensor, freed)
            live += 400
            most = max(most, live)
            yield f"t{n}", tensor
            del tensor

    written = write_hf(tmp_path, stream(), limit=2000)
    assert most <= 2000 + 2 * 400  # a file, the tensor that opens the next, the one being made
    assert [len(load_file(p)) for p in sorted(tmp_path.glob("*.safetensors"))] == [5, 5, 5, 5]
    assert (tmp_path / INDEX).is_file() and len(written) == 20
    assert not list(tmp_path.glob(".*"))


def test_a_tensor_above_the_limit_stands_alone(tmp_path: Path) -> None:
    sizes = [10, 1000, 10, 10]
    write_hf(tmp_path, ((f"t{n}", torch.zeros(size)) for n, size in enumerate(sizes)), limit=100)
    assert [set(load_file(p)) for p in sorted(tmp_path.glob("*.safetensors"))] == [{"t0"}, {"t1"}, {"t2", "t3"}]


def test_a_view_is_written_by_itself(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    write_hf(tmp_path, iter([("row", whole[1]), ("column", whole[:, 2])]), limit=1000)
    found = load_file(tmp_path / "model.safetensors")
    assert (found["row"].tolist(), found["column"].tolist()) == ([4, 5, 6, 7], [2, 6, 10])
    assert (tmp_path / "model.safetensors").stat().st_size < 500


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as draft:
        (draft / "all").write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/all"]
    with pytest.raises(UserError, match="out exists already; name a new folder"), new_folder(tmp_path / "out"):
        pass
