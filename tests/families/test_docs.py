"""docs/families.md is what docs/families.py makes of conf/model, but for what was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parent.parent.parent / "docs"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families_page", DOCS / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "families.md").read_text() == script().page(), "run: python docs/families.py"


def test_every_model_was_measured() -> None:
    import json

    from tests.weights.published import NAMES

    measured = json.loads((DOCS / "families.json").read_text())
    assert set(measured) == set(NAMES), "run: python docs/families.py --measure"
    assert max(measured.values()) < 1e-4
