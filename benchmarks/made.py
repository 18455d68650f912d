"""Data for the benchmarks: pictures with the detail of photographs, conversations, prepared as any other data set."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_nemo.data.config import DataConfig, PackConfig, PrepareConfig, SourceConfig
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.loader import Loader
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.tokenizer import Tokenizer

SOURCE = "made"
_COARSEST = 4
_ROUGHNESS = 0.62
"""Each octave's amplitude as a share of the one before: with it, files are as large as photographs' at quality 85."""


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG, 4:2:0, quality 85: noise of all scales, 73 KB at 512 x 512."""
    pixels = np.full((height, width, 3), 118, dtype=np.float32)
    side, strength = _COARSEST, 70.0
    while side < max(width, height):
        rows, columns = (max(2, side * extent // max(width, height)) for extent in (height, width))
        octave = rng.standard_normal((rows, columns, 3), dtype=np.float32)
        for channel in range(3):
            large = Image.fromarray(octave[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[:, :, channel] += strength * np.asarray(large)
        side, strength = 2 * side, strength * _ROUGHNESS
    pixels += 8 * rng.standard_normal((height, width, 1), dtype=np.float32)
    stream = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(stream, "JPEG", quality=85, subsampling="4:2:0")
    return stream.getvalue()


def words(rng: np.random.Generator, count: int) -> Iterator[str]:
    """So many words, of which few are frequent and many are rare, as in a language."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(3000)]
    for rank in np.minimum(rng.zipf(1.3, size=count), len(vocabulary)):
        yield vocabulary[rank - 1]


def conversations(rng: np.random.Generator, answer_words: Sequence[int]) -> list[list[str]]:
    """One question and an answer of so many words, each."""
    text = words(rng, sum(answer_words) + 8 * len(answer_words))
    return [
        [" ".join(next(text) for _ in range(8)) + "?", " ".join(next(text) for _ in range(count)) + "."]
        for count in answer_words
    ]


def prepared(
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    texts: Sequence[Sequence[str]],
    *,
    pictures: int,
    tokenizer_vocab: int = 0,
    template: str = "vicuna",
    shard_samples: int = 1000,
    without: Collection[int] = (),
) -> Path:
    """Shards of one source, `folder`/out/made, and a tokenizer if one is wanted; returns `folder`/out.

    Sample i shows a picture of sizes[i % len(sizes)]; so many different pictures are made and used again and again.
    tokenizer_vocab: train a tokenizer of that many tokens and measure the texts for it and `template`; without: the
    samples that show no picture. The raw files stay beside it: rows.json, images/.
    """
    rng = np.random.Generator(np.random.PCG64(1))
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range(pictures):
        (images / f"{i}.jpg").write_bytes(photograph(rng, *sizes[i % len(sizes)]))
    rows = [
        {
            "id": f"{i:06d}",
            **({} if i in without else {"image": f"{i % pictures}.jpg"}),
            "conversations": [
                {"from": "human", "value": question if i in without else f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for i, (question, answer) in enumerate(texts)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    manifest = folder / "manifest.yaml"
    manifest.write_text(f"name: made\nsources:\n  {SOURCE}: {{kind: llava, json: rows.json, images: images}}\n")
    cfg = PrepareConfig(
        manifest=str(manifest),
        out=str(folder / "out"),
        shard_samples=shard_samples,
        workers=1,
        tokenizer_vocab=tokenizer_vocab,
        template=template,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(cfg)
    return folder / "out"


def opened(
    out: Path, tokenizer: Tokenizer, spec: ImageSpec, *, capacity: int, rows: int, max_tokens: int, **more: Any
) -> Loader:
    """The repository's own loader of what `prepared` made: `rows` packed rows a step; more: options of the data."""
    cfg = DataConfig(
        sources={SOURCE: SourceConfig(path=str(out / SOURCE))},
        tokenizer=str(tokenizer.folder),
        template="vicuna",
        pack=PackConfig(capacity=capacity),
        global_packs=rows,
        **more,
    )
    return Loader(cfg, spec, tokenizer, seed=0, max_tokens=max_tokens, dp_rank=0, dp_size=1)


def tars(source: Path) -> list[str]:
    """The shards of a source, as webdataset takes them."""
    return [str(path) for path in sorted(source.glob("*.tar"))]
