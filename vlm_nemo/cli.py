"""`vlm-nemo VERB [key=value …]`: the table of verbs, and how an error ends a run.

A new verb is a row in VERBS, a root dataclass in config.py and a conf/<verb>.yaml. What needs torch is imported by
name, after the configuration has been found good.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_nemo import config
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.options import did_you_mean
from vlm_nemo.types import UserError


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One thing that `vlm-nemo` does."""

    name: str
    summary: str
    examples: tuple[str, str]
    root: type
    run: str
    """module:function, called with the composed root object."""
    required: tuple[str, ...] = ()
    """Keys that need a value in this verb, beyond those that the dataclasses demand."""
    named: tuple[str, ...] = ()
    """Keys that the command line itself has to name: a recipe's value means something else here."""
    positional: str | None = None
    """The key that a bare word sets."""
    recipes: bool = False
    """Takes `recipe=NAME`."""
    ranks: bool = True
    """Several processes work together; otherwise it runs in one."""
    notes: tuple[str, ...] = field(default=())
    """More lines for the help."""


CHECKPOINT_NOTE = "checkpoint=DIR is short for checkpoint.load=DIR"

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            name="prepare",
            summary="turn raw images and texts into indexed WebDataset shards",
            examples=(
                "vlm-nemo prepare data/shapes/manifest.yaml root=runs/demo/raw out=runs/demo/shards",
                "vlm-nemo prepare my/manifest.yaml out=shards/my workers=16 tokenizer_vocab=32000",
            ),
            root=PrepareConfig,
            run="vlm_nemo.data.prepare:prepare",
            positional="manifest",
            ranks=False,
            notes=("a path without a key is the manifest",),
        ),
        Verb(
            name="train",
            summary="train a model, or go on with a run that was stopped",
            examples=(
                "vlm-nemo train recipe=shapes/stage1 trainer.steps=50",
                "launch/local.sh 2 train recipe=shapes/stage2 parallel.tensor=2 run_dir=runs/two",
            ),
            root=config.Config,
            run="vlm_nemo.verbs.train:train",
            required=("data.sources", "data.tokenizer"),
            recipes=True,
            notes=(CHECKPOINT_NOTE,),
        ),
        Verb(
            name="evaluate",
            summary="ask a trained model held-out questions and write scores and a gallery",
            examples=(
                "vlm-nemo evaluate recipe=shapes/stage3 checkpoint=runs/demo/stage3/checkpoints",
                "launch/local.sh 2 evaluate recipe=shapes/stage3 checkpoint=runs/two/checkpoints evaluate.limit=20",
            ),
            root=config.Config,
            run="vlm_nemo.verbs.evaluate:evaluate",
            required=("checkpoint.load", "evaluate.data"),
            named=("checkpoint.load",),  # a recipe's is where its training starts from
            recipes=True,
            notes=(CHECKPOINT_NOTE, "the model's own settings come from the checkpoint"),
        ),
        Verb(
            name="generate",
            summary="answer a question about images",
            examples=(
                'vlm-nemo generate checkpoint=runs/demo/stage3/checkpoints image=cat.jpg prompt="What is this?"',
                'vlm-nemo generate checkpoint=DIR image=[a.jpg,b.jpg] prompt="What differs?" infer.max_new_tokens=20',
            ),
            root=config.GenerateRoot,
            run="vlm_nemo.verbs.generate:generate",
            required=("checkpoint.load", "prompt"),
            notes=(CHECKPOINT_NOTE, "the model's own settings come from the checkpoint"),
        ),
    )
}

FLAGS = ("--help", "--validate", "--cfg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code: 0 done, 1 a bug, 2 something that the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except UserError as error:
        report(error)
        return 2
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
    for key in verb.named:
        if not any(override.startswith(f"{key}=") for override in asked.overrides):
            raise UserError(config.missing(key, verb.root))
    cfg: Any = config.build(composed, verb.root)
    for key in verb.required:
        if _value(cfg, key) in (None, "", {}):
            raise UserError(config.missing(key, verb.root))
    check_ranks(verb, cfg, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if "--validate" in flags:
        print("ok")
        return 0
    module, _, function = verb.run.partition(":")
    getattr(importlib.import_module(module), function)(cfg)
    return 0


def check_ranks(verb: Verb, cfg: Any, *, world_size: int) -> None:
    """The layout against the number of processes, as far as it can be known before a checkpoint is opened."""
    from vlm_nemo.runtime.layout import check_layout

    if not verb.ranks and world_size > 1:
        raise UserError(f"{verb.name} runs in one process, not {world_size}; its option `workers` makes it use more")
    if verb.name == "train":
        check_layout(
            cfg.parallel,
            cfg.model,
            world_size=world_size,
            global_packs=cfg.data.global_packs,
            capacity=cfg.data.pack.capacity,
        )
    elif verb.ranks:
        check_layout(cfg.parallel, None, world_size=world_size)


def _value(cfg: object, key: str) -> object:
    for word in key.split("."):
        cfg = getattr(cfg, word)
    return cfg


def report(error: UserError) -> None:
    """The user's error as one line: rank 0 prints it, another rank leaves it for the launcher (runtime/local.py)."""
    line = f"error: {' '.join(str(error).splitlines())}"
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    elif path := os.environ.get("VLM_NEMO_ERROR_FILE"):
        with open(path, "w", encoding="utf-8") as file:
            file.write(line)


def entry() -> None:
    """The console script. A rank that failed leaves at once: waiting for its peers in an exit handler could hang."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
