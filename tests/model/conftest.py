"""A model of one process for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests import tiny
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import PackedBatch


@pytest.fixture
def model() -> Iterator[VLM]:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        (chunk,) = build_model(tiny.tiny_model(), ParallelConfig(), "fp32", seed=0)
        yield chunk.eval()
        groups.stop()


@pytest.fixture
def to_batch() -> Callable[[PackedBatch], ModelBatch]:
    def convert(packed: PackedBatch) -> ModelBatch:
        return model_batch(packed, tiny.tiny_model(), image_token=tiny.IMAGE, device=torch.device("cpu"))

    return convert
