"""What every benchmark shares at its end: a table on the screen, a JSON file of results, the table of README.md."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
_BEGIN = "<!-- results: written by the commands -->\n"
_END = "<!-- end -->\n"


WANTED = {
    "step_nvidia*": (
        "Stage 1 of LLaVA-1.5 7B on one GPU: at least 50 % MFU; stage 2: 48 %; data wait below 1 %",
        "python -m benchmarks.step",
        "one H200",
    ),
}
"""Goals that nobody measured yet, by the results that would: claim, command, hardware."""


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """--quick and --results, which every benchmark has; module: its `__spec__.name`."""
    found = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; figures mean nothing")
    found.add_argument(
        "--results",
        type=Path,
        help=f"folder for the results; default {RESULTS.relative_to(HERE.parent)} and its table in README.md, "
        "or none with --quick",
    )
    return found


def hardware() -> str:
    """As in "AMD EPYC 9B14, 2 cores"."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys as a table; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if os.isatty(1) else 160).print(table, highlight=False)


def save(
    args: argparse.Namespace,
    name: str,
    *,
    claim: str,
    figure: str,
    rows: Sequence[Mapping[str, Any]],
    packages: Sequence[str],
    file: str | None = None,
    on: str | None = None,
    **more: Any,
) -> None:
    """Write NAME.json; in the default folder, bring README.md's table up to date too.

    claim: what is said; figure: what was measured, in a few words; file: its name without .json, where it is not the
    command's; on: the hardware, where it is not the CPU.
    """
    folder = args.results or (None if args.quick else RESULTS)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "claim": claim,
        "figure": figure,
        "command": f"python -m benchmarks.{name}" + (" --quick" if args.quick else _asked(args)),
        "date": datetime.date.today().isoformat(),
        "hardware": on or hardware(),
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in packages},
        "rows": rows,
        **more,
    }
    (folder / f"{file or name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if folder == RESULTS:
        README.write_text(with_table(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def _asked(args: argparse.Namespace) -> str:
    """ " --pairs 3": how often and what was measured, where the command has such an option and it was given."""
    given = {name: getattr(args, name, None) for name in ("pairs", "steps", "compile")}
    words = {name: value if isinstance(value, list) else [value] for name, value in given.items() if value is not None}
    return "".join(f" --{name} {' '.join(map(str, value))}" for name, value in words.items())


def with_table(readme: str, results: Path) -> str:
    """README.md's text with its table made anew from the results."""
    lines = ["| claim | measured | command | date | hardware |", "|---|---|---|---|---|"]
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        cells = (found["claim"], found["figure"], f"`{found['command']}`", found["date"], found["hardware"])
        lines.append("| " + " | ".join(cells) + " |")
    for kind, (claim, command, where) in WANTED.items():
        if not any(results.glob(f"{kind}.json")):
            lines.append(f"| {claim} | | `{command}` | | {where} |")
    before, rest = readme.split(_BEGIN)
    return before + _BEGIN + "\n".join(lines) + "\n" + rest[rest.index(_END) :]
