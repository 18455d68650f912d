"""One tokenizer and one model for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.infer.fakes import Weights, make_tokenizer
from vlm_nemo.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def weights(tokenizer: Tokenizer) -> Weights:
    return Weights(tokenizer.vocab_size + 5, tokenizer.image_id)  # a padded head, as after rounding the vocabulary up
