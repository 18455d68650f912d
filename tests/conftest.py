"""Shared fixtures: what is made once for the whole session, and ranks of one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a team on a few cores waits, and burns them


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def llava_twin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny LLaVA of transformers: its folder and the model."""
    from tests.weights import twins

    folder = tmp_path_factory.mktemp("twin") / "hf"
    return folder, twins.llava(folder)


@pytest.fixture(scope="session")
def exported(llava_twin: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export in fp32."""
    from tests.export.twin import CAPACITY, export

    out = tmp_path_factory.mktemp("export") / "fp32"
    export(f"hf={llava_twin[0]}", f"out={out}", "precision=fp32", "slots=4", f"capacity={CAPACITY}")
    return out


@pytest.fixture
def one_process() -> Iterator[None]:
    """What models, optimizers and checkpoints need to know of ranks, where there is one."""
    from vlm_nemo.runtime import device, groups  # with the first test that needs torch
    from vlm_nemo.runtime.config import ParallelConfig

    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        yield
        groups.stop()


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.pretended` needs of C++."""
    import torch

    from tests.pretended import compile_guard

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and nothing to pretend")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return compile_guard(tmp_path_factory.mktemp("guard"))
