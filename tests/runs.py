"""A small prepared data set, and `vlm-nemo` as a person runs it, for the tests that go the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import warm
from vlm_nemo.runtime.local import free_port

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "recipe=shapes/stage0",
    "precision=fp32",
    "model.vision.hidden_size=32",
    "model.vision.num_layers=2",
    "model.vision.num_heads=2",
    "model.vision.ffn_hidden_size=64",
    "model.language.hidden_size=32",
    "model.language.num_heads=2",
    "model.language.num_kv_heads=2",
    "model.language.ffn_hidden_size=64",
    "data.pack.capacity=256",
    "data.global_packs=4",
    "optim.warmup_steps=2",
]
"""A training run that takes seconds."""

WARM = ("train", "evaluate", "generate", "convert", "export", "check")
"""Verbs that import megatron-core."""


def make_data(folder: Path, images: int = 300) -> Path:
    """Raw shapes, prepared: folder/shards/{captions,instruct,eval,tokenizer}."""
    run([sys.executable, "data/shapes/prepare.py", f"out={folder}/raw", f"images={images}", "questions=4", "workers=1"])
    manifest = (ROOT / "data/shapes/manifest.yaml").read_text()
    (folder / "manifest.yaml").write_text(manifest.replace("name: shapes", "name: shapes\nroot: raw"))
    vlm_nemo("prepare", folder / "manifest.yaml", f"out={folder}/shards", "tokenizer_vocab=500", "workers=1")
    return folder / "shards"


def data_words(shards: Path) -> list[str]:
    """The words that point a shapes recipe at prepared data."""
    return [
        f"data.tokenizer={shards}/tokenizer",
        f"data.sources.captions.path={shards}/captions",
        f"data.sources.instruct.path={shards}/instruct",
        f"evaluate.data={shards}/eval",
    ]


def run(command: list[Any], *, code: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout and check how it ends."""
    words = [str(word) for word in command]
    environment = _environment()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)
    return _check(done, code)


def vlm_nemo(*words: Any, ranks: int = 1, code: int = 0, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """`vlm-nemo …`, on several processes too.

    fresh: by an interpreter of its own or by launch/local.sh, as a person starts it; else forked from one that is warm.
    """
    said = [str(word) for word in words]
    if fresh or said[0] not in WARM:
        start = [sys.executable, "-m", "vlm_nemo"] if ranks == 1 else ["launch/local.sh", ranks]
        return run([*start, *said], code=code)
    environments = [_environment()]
    if ranks > 1:
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [_environment() | common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
    return _check(warm.run_module("vlm_nemo", said, folder=ROOT, environments=environments, timeout=300), code)


def _environment() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _check(done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == code, f"{done.args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that a test stops; it does not outlive a test that fails before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trace(run_dir: Path) -> list[tuple[int, float, float]]:
    """What must repeat to the bit: (step, loss, gradient norm)."""
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]
