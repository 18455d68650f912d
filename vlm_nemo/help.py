"""The text of `--help`: what a verb does, two examples, every option with type, default and description.

Nothing heavy is imported: defaults come from the dataclasses and from the YAML files that a verb starts with.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_nemo.config import GROUPS
from vlm_nemo.options import Option, sections
from vlm_nemo.parts import flat, group_choices, home, part_values, recipe_names

if TYPE_CHECKING:
    from vlm_nemo.verbs.table import Verb

FOOTER = """\
vlm-nemo VERB --help            every option of a verb
vlm-nemo VERB … --cfg           print the whole configuration and stop
vlm-nemo VERB … --validate      check the words and the layout and stop
launch/local.sh N VERB …        run a verb on N processes of this machine"""


def of_root(verbs: Iterable[Verb]) -> str:
    """`vlm-nemo --help`."""
    lines = ["vlm-nemo: train vision-language models with megatron-core", "", "usage: vlm-nemo VERB [key=value …]", ""]
    examples = []
    for verb in verbs:
        lines.append(f"  {verb.name:12}{verb.summary}")
        examples.append(f"  {verb.examples[0]}")
    return "\n".join([*lines, "", "examples:", *examples[:2], "", FOOTER])


def of_verb(verb: Verb) -> str:
    """`vlm-nemo VERB --help`."""
    lines = [f"vlm-nemo {verb.name}: {verb.summary}", "", "examples:", *(f"  {e}" for e in verb.examples), ""]
    lines += [f"  {note}" for note in (*verb.notes, "text needs quotes only for the shell; null means none")]
    if verb.recipes:
        lines.append("  recipes and parts: files of recipes/ and conf/, ours and those in the current folder")
        lines += _listed("recipes: ", recipe_names())
    selected = _selected_parts(verb.name)
    for group in selected:
        if len(choices := group_choices(group)) > 1:
            lines += _listed(f"{group} parts, {group}=NAME: ", choices)
    defaults = _yaml_defaults(verb.name, selected)
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    for section in sections(verb.root):
        if not section.options:
            continue
        lines += ["", f"{section.key or 'options'}: {section.title}"]
        for option in section.options:
            lines += _option(option, defaults.get(option.key, option.default), verb, width)
    return "\n".join(lines)


def _listed(label: str, names: list[str]) -> list[str]:
    return textwrap.wrap(label + ", ".join(names), 110, initial_indent="  ", subsequent_indent="      ")


def _option(option: Option, default: Any, verb: Verb, width: int) -> list[str]:
    needed = option.key in verb.required or default == "???"
    model = option.key in verb.model
    value = "…" if needed or model or default is MISSING else _shown(default)
    remark = ", needed" if needed else f", one of these {len(verb.model)} needed" if model else ""
    text = f"{option.doc} One of {', '.join(option.choices)}." if option.many_choices else option.doc
    doc = textwrap.wrap(text, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {option.key}={value}  ({option.type_name}{remark})", *doc]


def _shown(value: Any) -> str:
    """A default as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_shown(v) for v in value) + "]"
    return str(value)


def _selected_parts(verb: str) -> dict[str, str]:
    """{group: option} that conf/<verb>.yaml starts with."""
    listed = _load(home() / "conf" / f"{verb}.yaml").get("defaults", [])
    return {g: o for entry in listed if isinstance(entry, dict) for g, o in entry.items() if g in GROUPS}


def _yaml_defaults(verb: str, selected: dict[str, str]) -> dict[str, Any]:
    """{key: value} that the YAML files set over the dataclasses' own defaults."""
    conf = home() / "conf"
    values: dict[str, Any] = {}
    for group, choice in selected.items():
        values.update({f"{group}.{key}": value for key, value in part_values(group, choice).items()})
    own = _load(conf / f"{verb}.yaml")
    own.pop("defaults", None)
    return {**values, **flat(own)}


def _load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
