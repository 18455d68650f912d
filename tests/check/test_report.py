"""What was found is shown as it stands, whatever the data calls its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from vlm_nemo.check.report import Finding, Table, show, write


def test_brackets_are_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "img[copy] of checkpoint.reset=[projector] in [/data] :smile:"
    table = Table(title=f"title {odd}", columns=("name", "figure"), rows=[(f"cell {odd}", "1")])
    finding = Finding(part="dry", ok=False, verdict=f"verdict {odd}", tables=[table], notes=[f"note {odd}"])
    show([finding], Console(width=200))
    said, page = capsys.readouterr().out, write(tmp_path, [finding], "odd").read_text()
    for word in ("title", "cell", "verdict", "note"):
        assert f"{word} {odd}" in said and f"{word} {odd}" in page
