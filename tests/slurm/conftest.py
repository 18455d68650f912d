"""One Slurm cluster for this folder's tests. Where there can be none they are skipped; in CI they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        if "CI" in os.environ:  # there it must run
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster() as started:
        yield started
