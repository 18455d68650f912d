"""A server for each test file's plain tests; tests that break or hold something start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.serve import run
from vlm_nemo.serve.run import Server

from .parrot import Parrot, make_tokenizer, served


@pytest.fixture(autouse=True, scope="session")
def _no_key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(run.KEY_VARIABLE, raising=False)
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def parrot(tokenizer: Tokenizer) -> Parrot:
    return Parrot(tokenizer)


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    with served(Parrot(tokenizer)) as running:
        yield running
