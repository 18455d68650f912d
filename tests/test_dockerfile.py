"""The image installs by name what pyproject.toml asks for: torch and its kind come with the base image."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_dependency_is_left_out() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=\[]", line)[0] for line in wanted} - {"torch"}
    installed = set(re.findall(r"[\w-]+", (ROOT / "Dockerfile").read_text()))
    assert names <= installed, f"the Dockerfile does not install {', '.join(sorted(names - installed))}"
