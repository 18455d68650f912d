"""data/shapes is a folder of scripts: put it on the path as `python data/shapes/prepare.py` does."""

from __future__ import annotations

import sys
from pathlib import Path

SHAPES = Path(__file__).parents[2] / "data" / "shapes"
sys.path.insert(0, str(SHAPES))
