"""Supervised samples a CPU second of the whole loader: read, decode, tokenise, put into batches.

ours    the repository's Loader: index, fast decoding to uint8, packed rows of 4096
theirs  webdataset -> PIL -> transformers' LlavaProcessor (CLIPImageProcessorPil, fast tokenizer) -> batches of 16
        padded to their longest, labels masked up to the answer

The same shards, tokenizer, template, image size (336, short side resized, middle cut out) and labels; one question and
answer an image. Each run is a process of its own, whose CPU time is taken from its fifth batch on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.made import SOURCE, conversations, opened, prepared, tars
from benchmarks.paired import compare
from benchmarks.report import HERE, parser, save, show

SIDE, PATCH, CAPACITY, BATCH = 336, 14, 4096, 16
STEP = 4
"""Rows that ours makes at a time; the first so many batches of either are not counted."""
PLACEHOLDERS = (SIDE // PATCH) ** 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = ((640, 480), (512, 512), (480, 640), (640, 427))
"""Of pictures on the web and in COCO."""


class Batch(NamedTuple):
    """What a run counts."""

    samples: int
    supervised: int
    tokens: int
    """Places in the batch, padding included."""


def ours(out: Path, threads: int) -> Iterator[Batch]:
    from vlm_nemo.data.config import LayoutConfig
    from vlm_nemo.data.layout.spec import image_spec
    from vlm_nemo.data.tokenizer import Tokenizer

    logging.disable()  # that lengths are not prepared
    spec = image_spec(LayoutConfig(aspect="crop"), size=SIDE, patch=PATCH, mean=MEAN)
    sizes = dict(capacity=CAPACITY, rows=STEP, max_tokens=CAPACITY)
    with closing(opened(out, Tokenizer(out / "tokenizer"), spec, **sizes, threads=threads)) as loader:
        while True:
            for batch in loader.next().batches:
                yield Batch(batch.samples, batch.supervised, len(batch.tokens))


def theirs(out: Path) -> Iterator[Batch]:
    import torch
    import webdataset
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    tokenizer.padding_side = "right"
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, image_mean=MEAN, image_std=STD)
    processor = LlavaProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full")
    marker = tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"]

    def collate(samples: list[tuple[Any, Any]]) -> Batch:
        pictures = [picture for picture, _ in samples]
        batch = processor(
            images=pictures, text=[spoken(c["messages"]) for _, c in samples], padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        for row in labels:
            row[: _after(row, marker)] = -100
        assert batch["pixel_values"].shape == (len(samples), 3, SIDE, SIDE)
        return Batch(len(samples), int((labels != -100).sum()), labels.numel())

    def forever() -> Iterator[tuple[Any, Any]]:
        while True:
            stream = webdataset.WebDataset(tars(out / SOURCE), shardshuffle=False).shuffle(100)
            yield from stream.decode("pil").to_tuple("0.jpg", "json")

    waiting: list[tuple[Any, Any]] = []
    torch.set_num_threads(1)
    for sample in forever():
        waiting.append(sample)
        if len(waiting) == BATCH:
            yield collate(waiting)
            waiting = []


def spoken(messages: list[dict[str, str]]) -> str:
    """One question and its answer in the vicuna template, special tokens written out."""
    from vlm_nemo.data.chat import TEMPLATES

    template = TEMPLATES["vicuna"]
    question, answer = (message["content"] for message in messages)
    return f"<s>{template.system} USER: {question} ASSISTANT: {answer}</s>"


def _after(row: Any, marker: list[int]) -> int:
    """Where the answer begins."""
    values = row.tolist()
    for start in range(len(values) - len(marker), -1, -1):
        if values[start : start + len(marker)] == marker:
            return start + len(marker)
    raise ValueError("no answer in a sample")


def count(batches: Iterator[Batch], samples: int) -> dict[str, float]:
    """CPU seconds a sample and what the batches held, once every thread is at work."""
    for _ in range(STEP):
        next(batches)
    started = time.process_time()
    total = np.zeros(3, dtype=np.int64)
    while total[0] < samples:
        total += next(batches)
    seconds = (time.process_time() - started) / total[0]
    found, supervised, places = total.tolist()
    return {"seconds": seconds, "supervised": supervised / found, "places": places / found}


def run(side: str, out: Path, samples: int, threads: int) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader", "--side", side, "--data", str(out)]
    command += ["--samples", str(samples), "--threads", str(threads)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def make(folder: Path, samples: int) -> Path:
    rng = np.random.Generator(np.random.PCG64(4))
    # Answers like those of instruction data: many short ones, some of hundreds of words
    lengths = np.clip(rng.lognormal(3.0, 1.2, size=samples), 2, 400).astype(int).tolist()
    texts = conversations(rng, lengths)
    return prepared(folder, SIZES, texts, pictures=min(samples, 200), tokenizer_vocab=4000, shard_samples=250)


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    if args.side:
        batches = ours(args.data, args.threads) if args.side == "ours" else theirs(args.data)
        print(json.dumps(count(batches, args.samples)))
        return
    made, samples, pairs = (48, 16, 1) if args.quick else (1000, 400, 10)
    with tempfile.TemporaryDirectory() as folder:
        out = make(Path(folder), made)
        held: dict[str, dict[str, float]] = {}

        def side(name: str) -> float:
            held[name] = run(name, out, samples, args.threads)
            return held[name]["seconds"]

        found = compare(lambda: side("ours"), lambda: side("theirs"), pairs, warm_up=False)
    ratio, low, high = found.ratio()
    rates = dict(zip(("ours", "theirs"), found.rates(1), strict=True))
    names = {"ours": "vlm_nemo, packed", "theirs": "webdataset + LlavaProcessor, padded"}
    rows = [
        {
            "loader": names[name],
            "samples/s of CPU": round(rates[name], 1),
            "CPU ms a sample": round(1000 / rates[name], 3),
            "supervised tokens a sample": round(held[name]["supervised"], 1),
            "places a sample": round(held[name]["places"], 1),
        }
        for name in names
    ]
    interval = f"{low:.2f} to {high:.2f}"
    show(f"whole loader, {pairs} pairs of {samples} samples: ratio {ratio:.2f} ({interval})", rows)
    save(
        args,
        "loader",
        claim="The whole loader: at least 2.5 times webdataset + transformers' LLaVA processor + padding",
        figure=f"{ratio:.2f} times ({interval}): {rates['ours']:.0f} against {rates['theirs']:.0f} samples/s of CPU",
        rows=rows,
        packages=("webdataset", "transformers", "tokenizers", "pillow", "simplejpeg", "torch", "numpy"),
        pairs=pairs,
        ratio=ratio,
        interval=[low, high],
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    found = parser("benchmarks.loader", __doc__)
    found.add_argument("--threads", type=int, default=2, help="decoding threads of ours; default 2, as data.threads")
    found.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # one run, in its own process
    found.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    found.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    return found.parse_args(argv)


if __name__ == "__main__":
    main()
