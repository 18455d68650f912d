"""One prepared data set for all tests that only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.raw_data import make_prepared
from vlm_nemo.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prepared(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer(prepared / "tokenizer")
