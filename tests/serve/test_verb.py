"""`vlm-nemo serve` as a person types it: a checkpoint in one process and over two ranks, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import runs

from .parrot import http, image_part, png, user

QUESTION = "What colour is it?"


@pytest.fixture(scope="module")
def checkpoint(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.vlm_nemo("train", *runs.TINY, *runs.data_words(shards), f"run_dir={folder}", "trainer.steps=2")
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def said(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `vlm-nemo generate` answers."""
    image = tmp_path_factory.mktemp("image") / "a.png"
    image.write_bytes(png(64, 64))
    words = (f"checkpoint={checkpoint}", f"image={image}", f"prompt={QUESTION}", "infer.max_new_tokens=12")
    return runs.vlm_nemo("generate", *words).stdout.strip()


@contextmanager
def serving(*words: object, ranks: int = 1) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL that it prints, and the process; afterwards it is told to stop, and has to end well."""
    start = [sys.executable, "-m", "vlm_nemo"] if ranks == 1 else ["launch/local.sh", str(ranks)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "VLM_NEMO_API_KEY")}
    environment |= {"OMP_NUM_THREADS": "1", "VLM_NEMO_PYTHON": sys.executable}
    command = [*start, "serve", "serve.port=0", *map(str, words)]
    process = subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line
        yield line.split()[3], process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    "layout",
    [(), ("parallel.tensor=2",), pytest.param(("parallel.pipeline=2",), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_server_says_what_generate_says(checkpoint: Path, said: str, layout: tuple[str, ...]) -> None:
    with serving(f"checkpoint={checkpoint}", *layout, ranks=2 if layout else 1) as (url, _):
        body = {"messages": user(image_part(png(64, 64)), QUESTION), "temperature": 0, "max_tokens": 12}
        for _ in range(2):
            answer = http.post(f"{url}/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"].strip() == said
        drawn = {**body, "temperature": 2, "n": 2}
        assert http.post(f"{url}/v1/chat/completions", json=drawn).status_code == 200  # all ranks draw alike
        assert http.get(f"{url}/v1/metadata").json()["model"]["backend"] == "torch"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name the model, as one of checkpoint=DIR, hf=DIR, export=DIR"),
        (("hf=a", "export=b"), "name the model, as one of checkpoint=DIR, hf=DIR, export=DIR (not hf, export)"),
        (("export=nowhere",), "nowhere"),
        (("export=nowhere", "serve.host=0.0.0.0"), "serve.host=0.0.0.0 can be reached from other machines"),
        (("export=nowhere", "port=9000"), "no option port; did you mean serve.port?"),
    ],
)
def test_what_cannot_be_served_is_one_line(words: tuple[str, ...], says: str) -> None:
    done = runs.run([sys.executable, "-m", "vlm_nemo", "serve", "serve.port=0", *words], code=2)
    assert done.stdout == "" and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_launch_script_passes_its_words_on() -> None:
    assert "vlm-nemo serve: " in runs.run(["launch/serve.sh", "--help"]).stdout
