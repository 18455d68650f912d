"""The real img2dataset. Where it cannot be installed its tests are skipped; in CI they fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.data.raw.web import NoDownloader, downloader


@pytest.fixture(scope="session")
def img2dataset() -> Path:
    """The Python that has it."""
    try:
        return downloader()
    except NoDownloader as error:
        if "CI" in os.environ:  # there it must run
            pytest.fail(str(error))
        pytest.skip(str(error))
