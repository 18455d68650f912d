"""One prepared data set for all tests that only read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.data.raw_data import make_prepared
from tests.data.tokenizers import make_tokenizer
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.layout.plan import NAME
from vlm_nemo.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prepared(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with the special tokens of every template."""
    texts = [text for template in TEMPLATES.values() for text in asdict(template).values() if isinstance(text, str)]
    return make_tokenizer(tmp_path_factory.mktemp("rich"), NAME.findall("".join(texts)))


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer(prepared / "tokenizer")
