"""Where parts and recipes lie: conf/ and recipes/ beside the package, and those of the current folder.

conf/GROUP/NAME.yaml is what `GROUP=NAME` sets, recipes/NAME.yaml what `recipe=NAME` sets. Light: help reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vlm_nemo.types import UserError


def home() -> Path:
    """The folder that holds conf/ and recipes/: the package when installed from a wheel, else the checkout."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parent


def recipe_folders() -> list[Path]:
    """Where `recipe=NAME` looks: recipes/ of the current folder (one's own), then ours."""
    return list(dict.fromkeys(folder for folder in (Path.cwd() / "recipes", home() / "recipes") if folder.is_dir()))


def part_folders() -> list[Path]:
    """Where `model=NAME` and the other parts are looked up: ours, then conf/ of the current folder (one's own)."""
    return list(dict.fromkeys(folder for folder in (home() / "conf", Path.cwd() / "conf") if folder.is_dir()))


def recipe_names() -> list[str]:
    """Every recipe that `recipe=` accepts by name, sorted: `shapes/stage1`, … (`_base` is what recipes share.)"""
    files = [(folder, path) for folder in recipe_folders() for path in folder.rglob("[!_]*.yaml")]
    return sorted({path.relative_to(folder).with_suffix("").as_posix() for folder, path in files})


def group_choices(group: str) -> list[str]:
    """The names that `group=` accepts: the YAML files of conf/<group>/, ours and of the current folder."""
    return sorted({path.stem for folder in part_folders() for path in (folder / group).glob("*.yaml")})


def part_values(group: str, name: str) -> dict[str, Any]:
    """What a part sets, on top of the parts that its `defaults` name: {"language.num_layers": 32}."""
    path = next(path for folder in part_folders() if (path := folder / group / f"{name}.yaml").is_file())
    part = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    values: dict[str, Any] = {}
    for base in part.pop("defaults", []):
        if base != "_self_":
            values.update(part_values(group, base))
    return {**values, **flat(part)}


def check_own_names(verb: str, choices: Mapping[str, str | None]) -> None:
    """Refuse a file in the current folder's conf/ that is named as one of ours that is in use and says something else.

    choices: {group: part}; what these start with is compared too. Ours would be read without a word, for recipes mean
    ours; a copy to the byte is as good. Raises UserError.
    """
    ours, *own = part_folders()
    used = [verb, *(f"{group}/{choice}" for group, choice in choices.items() if choice)]
    for folder in own:
        for name in (each for file in used for each in _with_bases(file)):
            mine, yours = ours / f"{name}.yaml", folder / f"{name}.yaml"
            if mine.is_file() and yours.is_file() and mine.read_bytes() != yours.read_bytes():
                instead = "give it another name" if "/" in name else "put what it says into recipes/NAME.yaml"
                raise UserError(f"{yours} has the name of {mine}, which is read instead; {instead}, or take it away")


def _with_bases(name: str) -> Iterator[str]:
    """A part and those that it starts with: model/llava15_13b, model/llava15_7b."""
    yield name
    for folder in part_folders():
        if (path := folder / f"{name}.yaml").is_file():
            for base in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []):
                if isinstance(base, str) and base != "_self_":
                    yield from _with_bases(str(PurePosixPath("/", name).parent / base).lstrip("/"))
            return


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
