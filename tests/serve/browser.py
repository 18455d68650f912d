"""The system's Chromium, headless, for the page's test and its picture.

`python -m tests.serve.browser URL PICTURE QUESTION … OUT` asks a running server and saves what the page then looks
like: so docs/page.png was made.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: name.endsWith("png") ? "image/png" : "image/jpeg"}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


def chromium() -> str | None:
    """Where it is installed."""
    found = (shutil.which(name) for name in (os.environ.get("CHROMIUM", ""), *NAMES) if name)
    return next((path for path in found if path), None)


@contextmanager
def page(**context: Any) -> Iterator[Any]:
    """An empty tab; ends with the messages of its console checked: none may be an error."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        tab = browser.new_page(**{"viewport": {"width": 900, "height": 800}, **context})
        tab.set_default_timeout(15_000)
        tab.errors = []
        tab.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        try:
            yield tab
        finally:
            browser.close()


def drop(tab: Any, data: bytes, name: str) -> None:
    """Let go of a file over the page."""
    tab.evaluate(DROP, [base64.b64encode(data).decode(), name])


def picture(url: str, image: Path, questions: Sequence[str], out: Path) -> None:
    """Ask the questions about `image` at a running server, one after the other, and save a screenshot."""
    with page(device_scale_factor=2, viewport={"width": 760, "height": 800}) as tab:
        tab.goto(url)
        drop(tab, image.read_bytes(), image.name)
        tab.get_by_role("img", name="Picture 1").wait_for()
        for number, question in enumerate(questions):
            tab.get_by_role("textbox", name="Question").fill(question)
            tab.get_by_role("button", name="Ask").click()
            tab.locator(".turn.assistant:not(.busy) .figures").nth(number).wait_for()
        tab.screenshot(path=str(out))


if __name__ == "__main__":
    picture(sys.argv[1], Path(sys.argv[2]), sys.argv[3:-1], Path(sys.argv[-1]))
