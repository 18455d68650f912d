"""What a rehearsal found: tables and verdicts, on the terminal and as one page with plots."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

TEXT = 24
"""Columns that a cell may be folded to."""
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#222}
p{max-width:70rem}.figures{overflow-x:auto}.figures td{white-space:nowrap}
.figures td:first-child{white-space:normal;min-width:14rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.bad td,.fail{color:#b3261e}.ok{color:#176b2c}
img{max-width:100%}h2{margin-top:2rem}
"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first column names, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bad: frozenset[int] = frozenset()
    """Rows in which a bound is broken: shown red."""


@dataclass(kw_only=True)
class Finding:
    """What one part of the rehearsal says."""

    part: str
    """plan | parity | leaks | data | dry"""
    ok: bool
    verdict: str
    """One line: what holds, or what does not and which key to change."""
    skipped: bool = False
    """Nothing was there to look at; neither good nor bad."""
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Assumptions, and what was left out."""
    figures: list[tuple[str, Any]] = field(default_factory=list)
    """(caption, matplotlib Figure)"""
    data: dict[str, Any] = field(default_factory=dict)
    """The same as plain data, for report.json."""

    @property
    def state(self) -> str:
        """ok | FAILED | skipped"""
        return "skipped" if self.skipped else "ok" if self.ok else "FAILED"


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print everything; the verdicts last, as one table."""
    for finding in findings:
        for table in finding.tables:
            console.print(Text(table.title, style="table.title"))
            for part in _fitting(table, console.width):
                console.print(_rich(part))
        for note in finding.notes:
            console.print(f"{finding.part}: {note}", highlight=False, markup=False, emoji=False)
    verdicts = RichTable(title="rehearsal", title_justify="left")
    for column in ("part", "", "what"):
        verdicts.add_column(column)
    for finding in findings:
        style = {"ok": "green", "FAILED": "red", "skipped": "yellow"}[finding.state]
        verdicts.add_row(finding.part, Text(finding.state, style=style), Text(finding.verdict))
    console.print(verdicts)


def write(folder: Path, findings: Sequence[Finding], title: str) -> Path:
    """report.html (one file, no scripts) and report.json; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(_plain(finding)), "figures": [c for c, _ in finding.figures]} for finding in findings]
    (folder / "report.json").write_text(json.dumps(content, indent=1, default=list) + "\n", encoding="utf-8")
    page = folder / "report.html"
    body = "".join(_section(finding) for finding in findings)
    rows = "".join(
        f"<tr class={'good' if f.ok else 'bad'}><td><a href='#{f.part}'>{f.part}</a><td>{f.state}"
        f"<td style='text-align:left'>{html.escape(f.verdict)}</tr>"
        for f in findings
    )
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table>{rows}</table>{body}</html>\n",
        encoding="utf-8",
    )
    return page


def _plain(finding: Finding) -> Finding:
    """Without the figures, which are no data."""
    return Finding(
        part=finding.part,
        ok=finding.ok,
        verdict=finding.verdict,
        skipped=finding.skipped,
        tables=finding.tables,
        notes=finding.notes,
        data=finding.data,
    )


def _section(finding: Finding) -> str:
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in finding.notes)
    tables = "".join(_html(table) for table in finding.tables)
    figures = "".join(
        f"<figure><img alt='{html.escape(caption, quote=True)}' src='data:image/png;base64,{_png(figure)}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, figure in finding.figures
    )
    state = "ok" if finding.ok else "fail"
    return (
        f"<h2 id={finding.part}>{finding.part}</h2><p class={state}>{html.escape(finding.verdict)}</p>"
        f"{tables}{figures}{notes}"
    )


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in table.columns)
    rows = "".join(
        f"<tr{' class=bad' if i in table.bad else ''}>" + "".join(f"<td>{html.escape(cell)}" for cell in row) + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return f"<h3>{html.escape(table.title)}</h3><div class=figures><table><tr>{head}</tr>{rows}</table></div>"


def _fitting(table: Table, width: int) -> Iterator[Table]:
    """The table where it is no wider; else with its headings folded, and its columns in several tables where that is
    not enough, the names before each."""
    if sum(_wide(table, i, table.columns[i]) for i in range(len(table.columns))) < width:
        yield table
        return
    folded = replace(table, columns=[heading.replace(" ", "\n") for heading in table.columns])
    needed = [_wide(folded, i, *folded.columns[i].split("\n")) for i in range(len(table.columns))]
    part, room = [0], width - needed[0] - 1
    for i in range(1, len(needed)):
        if needed[i] > room and len(part) > 1:
            yield _columns(folded, part)
            part, room = [0], width - needed[0] - 1
        part.append(i)
        room -= needed[i]
    yield _columns(folded, part)


def _wide(table: Table, column: int, *heading: str) -> int:
    """Of a column with its border; rich folds the widest first, and text may be folded."""
    widest = max((len(row[column]) for row in table.rows), default=0)
    return max(min(widest, TEXT), *map(len, heading)) + 3


def _columns(table: Table, chosen: Sequence[int]) -> Table:
    return replace(
        table, columns=[table.columns[i] for i in chosen], rows=[[row[i] for i in chosen] for row in table.rows]
    )


def _rich(table: Table) -> RichTable:
    made = RichTable()
    for i, column in enumerate(table.columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    for i, row in enumerate(table.rows):
        made.add_row(*map(Text, row), style="red" if i in table.bad else None)
    return made


def _png(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return base64.b64encode(file.getvalue()).decode()
