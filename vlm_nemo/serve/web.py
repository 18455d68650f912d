"""The page at /: one file, nothing from elsewhere, and a policy under which the browser runs only what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "page" / "index.html"


@cache
def page() -> str:
    """The page's HTML, its style and script inside."""
    return FILE.read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """The policy names the hash of each inline part, so that no injected script or style is ever run."""
    script, style = _hash("script"), _hash("style")
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"content-security-policy": policy, "cache-control": "no-cache", "x-frame-options": "DENY"}


def _hash(tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
