"""Errors of a configuration in one line that names the key: Hydra's, OmegaConf's, YAML's and our own."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from vlm_nemo.options import ANY_NAME, did_you_mean, find, options
from vlm_nemo.types import UserError


def missing(key: str, root: type) -> str:
    """The line about a key that has to be set and is not."""
    option = find(key, options(root))
    return f"{key} is not set" + (f": {option.doc}" if option and option.doc else "")


def check_choices(values: Any, root: type) -> None:
    """Enumerations are plain text to Hydra: compare them with their choices. Raises UserError."""
    for key, option in options(root).items():
        if not option.choices:
            continue
        value = values
        for word in key.split("."):
            value = value[word]
        for each in value if isinstance(value, list) else [value]:
            if each not in option.choices:
                hint = did_you_mean(str(each), option.choices)
                raise UserError(f"{key} must be {option.expected}, not {value!r}{hint}")


def explain(error: BaseException, root: type, recipe: str | None, groups: Collection[str]) -> str:
    """Hydra's and OmegaConf's errors in one line: full key, nearest key or expected type, and the file if it is one."""
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError
    from yaml import MarkedYAMLError

    where, said = "", re.match(r"In '([^']*)'", str(error))
    if said and said[1].partition("/")[0] in groups:
        where = f" (in conf/{said[1]}.yaml)"
    elif said and recipe is not None:
        where = f" (in recipe {recipe})"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}{where}"
    if isinstance(cause, ValidationError) and cause.full_key is not None:
        option = find(cause.full_key, options(root))
        if option is None:
            return f"{cause.full_key} holds several options and takes no value itself: set {cause.full_key}.…{where}"
        value = "null" if cause.value is None else repr(cause.value)
        return f"{cause.full_key} must be {option.expected}, not {value}{where}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key is not None:
        if cause.full_key.partition(".")[0] == "recipes":
            return f"recipe {recipe} lacks its first line: # @package _global_"
        return unknown(cause.full_key, root, groups) + where
    if isinstance(error, RecursionError):
        return "the `defaults` of a part or a recipe lead back to itself" + (f" (recipe {recipe})" if recipe else "")
    if folder := re.match(r"Could not override '(\w+)'", str(error)):
        name = folder[1]
        return f"{name} is an option, and a folder of that name beside recipes/ or in conf/ hides it; rename the folder"
    text = re.split(r"Config search path|\nSee http", str(error))[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) + where


def unknown(key: str, root: type, groups: Collection[str]) -> str:
    """The line about a key that does not exist. groups: the sections that there are."""
    known = options(root)
    own = [group for group in groups if any(k.startswith(group + ".") for k in known)]
    hint = did_you_mean(key, [*known, *own])
    for holder in (k for k, option in known.items() if option.is_dict and key.startswith(k + ".")):
        hint = hint.replace(f"{holder}.{ANY_NAME}", ".".join(key.split(".")[: holder.count(".") + 2]))
    return f"no option {key}{hint}"
