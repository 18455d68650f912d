"""One small model and its words for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_model
from vlm_nemo.check.made import Subject, subject
from vlm_nemo.train.config import OptimConfig

ALL = OptimConfig(vision_lr=1e-3, projector_lr=1e-3, language_lr=1e-3)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Every part learns."""
    return subject(tiny_model(), ALL, "vicuna", tmp_path_factory.mktemp("words"))
