"""`vlm-nemo VERB [key=value …]`: from words to a verb's function, and how an error ends a run.

What needs torch is imported by name, after the configuration has been found good.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlm_nemo import config, explain
from vlm_nemo.options import did_you_mean
from vlm_nemo.runtime import signals
from vlm_nemo.types import UserError
from vlm_nemo.verbs.table import VERBS, Verb

FLAGS = ("--help", "--validate", "--cfg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code: 0 done, 1 a bug, 2 something that the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        report(error)
        return 2
    except BrokenPipeError:  # `… | head` has seen enough; what is left must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception:
        import traceback

        rank = os.environ.get("RANK", "0")
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1


def _run(words: list[str]) -> int:
    from vlm_nemo import help

    if not words or words[0] in ("--help", "-h", "help"):
        print(help.of_root(VERBS.values()))
        return 0
    if words[0] == "--version":
        import vlm_nemo

        print(f"vlm_nemo {vlm_nemo.__version__}")
        return 0
    verb = VERBS.get(words[0])
    if verb is None:
        raise UserError(f"no verb {words[0]!r}{did_you_mean(words[0], VERBS) or '; there are ' + ', '.join(VERBS)}")
    flags = {word for word in words[1:] if word.startswith("-")}
    if flags & {"--help", "-h"}:
        print(help.of_verb(verb))
        return 0
    if strange := sorted(flags - set(FLAGS)):
        raise UserError(f"no flag {strange[0]}{did_you_mean(strange[0], FLAGS)}")
    return _run_verb(verb, [word for word in words[1:] if word not in flags], flags)


def _run_verb(verb: Verb, words: list[str], flags: set[str]) -> int:
    from vlm_nemo.overrides import translate

    asked = translate(words, verb.root, recipes=verb.recipes, positional=verb.positional)
    composed = config.compose(verb.name, verb.root, asked.overrides, asked.recipe)
    if "--cfg" in flags:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(composed, resolve=True), end="")
        return 0
    cfg: Any = config.build(composed, verb.root)
    _choose_model(verb, cfg, asked.overrides)
    for key in verb.required:
        if _value(cfg, key) in (None, "", {}):
            raise UserError(explain.missing(key, verb.root))
    check_ranks(verb, cfg, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if "--validate" in flags:
        print("ok")
        return 0
    load(verb)(cfg)
    return 0


def load(verb: Verb) -> Callable[[Any], None]:
    """The function of a verb, with what it needs imported."""
    module, _, function = verb.run.partition(":")
    # megatron-core imports wandb where it is installed, over a second of CPU for an engine that no verb uses. A run
    # that logs to wandb imports it itself (train/metrics.py).
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        found: Callable[[Any], None] = getattr(importlib.import_module(module), function)
    finally:
        if hidden:
            sys.modules.pop("wandb", None)
    return found


def _choose_model(verb: Verb, cfg: Any, overrides: Sequence[str]) -> None:
    """Of the keys that may name the model, the command line has to name one; a recipe's others give way to it."""
    given = {override.partition("=")[0] for override in overrides}
    named = [key for key in verb.model if key in given and _value(cfg, key) not in (None, "", [])]
    if verb.model and len(named) != 1:
        choices = ", ".join(f"{key.removesuffix('.load')}=DIR" for key in verb.model)
        raise UserError(f"name the model, as one of {choices}" + (f" (not {', '.join(named)})" if named else ""))
    for key in verb.model:
        if key not in named:
            *path, last = key.split(".")
            holder = _value(cfg, ".".join(path)) if path else cfg
            setattr(holder, last, [] if isinstance(getattr(holder, last), list) else None)


def check_ranks(verb: Verb, cfg: Any, *, world_size: int) -> None:
    """The layout against the number of processes, as far as it can be known before a checkpoint is opened."""
    from vlm_nemo.runtime.layout import check_layout

    if not verb.ranks and world_size > 1:
        more = "; its option `workers` makes it use more" if hasattr(cfg, "workers") else "; start it by itself"
        raise UserError(f"{verb.name} runs in one process, not {world_size}{more}")
    if world_size > 1 and any(key.endswith("export") and _value(cfg, key) for key in verb.model):
        raise UserError(f"an export runs in one process, not {world_size}; checkpoint=DIR and hf=DIR run in several")
    if verb.name == "train":
        check_layout(
            cfg.parallel,
            cfg.model,
            world_size=world_size,
            global_packs=cfg.data.global_packs,
            micro_packs=cfg.data.micro_packs,
            capacity=cfg.data.pack.capacity,
        )
    elif verb.ranks:
        # Where a model answers, context ranks are replicas, and there may be any number of these
        check_layout(replace(cfg.parallel, context=1), None, world_size=world_size)


def _value(cfg: object, key: str) -> object:
    for word in key.split("."):
        cfg = getattr(cfg, word)
    return cfg


def report(error: UserError) -> None:
    """The user's error as one line. Rank 0 prints it; each rank leaves it for its launcher, which speaks for the others
    (runtime/local.py) and knows by it that trying again is no use (launch/lib.sh).
    """
    line = f"error: {' '.join(str(error).splitlines())}"
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("VLM_NEMO_ERROR_FILE"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(line)


def entry() -> None:
    """The console script. A rank that failed leaves at once: waiting for its peers in an exit handler could hang."""
    if sys.argv[1:2] == ["train"]:
        signals.hold()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
