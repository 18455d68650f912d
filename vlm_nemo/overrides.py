"""The words after the verb become Hydra overrides: shorthands, text that needs no quoting, misspelt keys caught."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_nemo.config import GROUPS, quote
from vlm_nemo.explain import unknown
from vlm_nemo.options import ANY_NAME, Option, did_you_mean, find, options
from vlm_nemo.parts import group_choices
from vlm_nemo.types import UserError

NAME = re.compile(r"[A-Za-z_][\w-]*")
"""What `<name>` in a key may be."""

PLAIN = re.compile(r"[\w.+-]*|\$\{.*\}")
"""What a number, a boolean, null or a reference to another key is written with; anything else is grammar to Hydra."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What the command line asks for."""

    overrides: tuple[str, ...]
    recipe: str | None


def translate(words: Sequence[str], root: type, *, recipes: bool, positional: Sequence[str] = ()) -> Words:
    """`key=value` words -> Hydra overrides for a verb with this root.

    checkpoint=DIR   -> checkpoint.load=DIR
    recipe=NAME      -> Words.recipe                      (where the verb takes recipes)
    WORD …           -> <positional>=WORD …               (one after the other, where the verb has such keys)
    text keys        -> quoted, so that spaces, commas, brackets and quotes arrive as typed

    Raises UserError for a word that is no `key=value` and for a key that does not exist.
    """
    overrides: list[str] = []
    recipe: str | None = None
    bare = iter(positional)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[~+]{0,2}[\w.<>-]+", key):
            if word.startswith("~"):
                overrides.append(_removal(word, root))
                continue
            place = None if word.startswith(("-", "+")) else next(bare, None)
            if place is None:
                raise UserError(f"cannot read {word!r}: expected key=value")
            key, value = place, word
        key = key.lstrip("+")
        if key == "recipe" and recipes:
            recipe = value
        elif key == "checkpoint" and "checkpoint.load" in options(root) and value not in group_choices(key):
            overrides.append(_override("checkpoint.load", value, root))
        elif key in GROUPS and any(k.startswith(key + ".") for k in options(root)):
            overrides.append(_group(key, value))
        else:
            overrides.append(_override(key, value, root))
    return Words(overrides=tuple(overrides), recipe=recipe)


def _group(group: str, value: str) -> str:
    choices = group_choices(group)
    if value not in choices:
        hint = did_you_mean(value, choices) or f"; there are {', '.join(choices)}"
        raise UserError(f"{group}={value}: conf/{group} has no {value!r}{hint}")
    return f"{group}={value}"


def _override(key: str, value: str, root: type) -> str:
    option = find(key, options(root))
    if option is None:
        holder, _, name = key.rpartition(".")
        if (free := options(root).get(holder)) is not None and free.is_free_dict:
            return f"++{holder}={{{name}:{value or quote('')}}}"
        raise UserError(unknown(key, root, GROUPS))
    hydra_value = _value(value, option)
    if ANY_NAME in option.key:
        holder, _, leaf = option.key.partition(f".{ANY_NAME}.")
        name = key.removeprefix(holder + ".").removesuffix("." + leaf)
        if not NAME.fullmatch(name):
            raise UserError(f"{key}: {name!r} is no name; use letters, digits, - and _")
        return f"++{holder}={{{name}:{{{leaf}:{hydra_value}}}}}"
    return f"++{key}={hydra_value}" if option.is_dict else f"{key}={hydra_value}"


def _value(value: str, option: Option) -> str:
    """The value in Hydra's grammar: text is quoted, other types are left for Hydra to read."""
    if value == "null" and option.nullable:
        return value
    if option.literal:
        value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    if option.is_text:
        return quote(value)
    if option.is_texts and not value.startswith("["):
        return f"[{quote(value)}]"
    if option.is_number and not PLAIN.fullmatch(value):
        raise UserError(f"{option.key} must be {option.expected}, not {value!r}")
    return value or quote("")


def _removal(word: str, root: type) -> str:
    """`~data.sources.captions` takes a named member out; nothing else can be removed."""
    key = word.removeprefix("~")
    holder, _, name = key.rpartition(".")
    option = options(root).get(holder)
    if option is None or not option.is_dict or not name:
        dicts = [f"~{o.key}.{ANY_NAME}" for o in options(root).values() if o.is_dict]
        raise UserError(f"cannot remove {key}: only {', '.join(dicts)}" if dicts else f"cannot remove {key}")
    return word
