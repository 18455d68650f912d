"""Converting holds one file's worth of tensors, not a model's."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from tests.weights import zoo
from tests.weights.test_round_trip import convert
from vlm_nemo.train import tensors
from vlm_nemo.weights import shards
from vlm_nemo.weights.hf_folder import HFFolder


class Watch:
    """Bytes of tensors that came out of a reader and are still held by somebody, at most."""

    def __init__(self) -> None:
        self.live = self.most = self.total = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.untyped_storage().nbytes()
        self.live += size
        self.total += size
        self.most = max(self.most, self.live)
        weakref.finalize(tensor, self._freed, size)
        return tensor

    def _freed(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "llava_mixtral"])
def test_one_file_s_worth_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    zoo.save(tmp_path / "hf", name)
    limit = 40_000
    watch = Watch()
    read, whole = HFFolder.tensor, tensors.Reader.whole
    monkeypatch.setattr(HFFolder, "tensor", lambda *given: watch(read(*given)))
    monkeypatch.setattr(tensors.Reader, "whole", lambda *given: watch(whole(*given)))
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    for words in (
        [f"hf={tmp_path}/hf", f"out={tmp_path}/ours"],
        [f"checkpoint={tmp_path}/ours", f"out={tmp_path}/back"],
    ):
        gc.collect()
        watch.most = watch.total = watch.live = 0
        convert(*words, f"max_shard_gb={limit / 1e9}")
        # the largest tensor, the embedding, is larger than the limit: a file of its own beside the one before
        largest = 384 * 32 * 4
        assert watch.most <= 2 * max(limit, largest), watch.most
        assert watch.most < size / 2.5 < watch.total
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert shards.INDEX in {path.name for path in (tmp_path / "back").iterdir()}
