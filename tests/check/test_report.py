"""What was found is shown as it stands, whatever the data calls its files and however narrow the terminal is."""

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


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_figure_is_cut_on_a_narrow_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns that do not fit stand in a table of their own, behind the names."""
    names = ["tensor 2, sequence, distributed optimizer, every other word there is", "packed"]
    columns = ["layout", "processes", "gradient norm", *(f"module {letter}" for letter in "abcdefghij")]
    rows = [[name, *(f"{i}.{n:03}e-07" for i in range(len(columns) - 1))] for n, name in enumerate(names)]
    finding = Finding(part="parity", ok=True, verdict="so", tables=[Table(title="all", columns=columns, rows=rows)])
    show([finding], Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(lines)
    assert all(said.count(f" {figure} ") == 1 for row in rows for figure in row[1:])
    assert "…" not in said and max(map(len, lines)) <= width
    assert {"gradient", "norm", "processes", "tensor"} <= set(said.replace("┃", " ").split())
    assert (said.count("packed") == 1) == (width == 200)
