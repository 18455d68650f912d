"""Every layout through the loader: lengths, plans and what is decoded agree; no sample is ever cut."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.data.layout.test_families import _NATIVE, CHATML, ROWS
from tests.data.layout.test_pixels import PATCH, PINPOINTS, SIDE
from tests.data.raw_data import finish_folder, picture
from tests.data.tokenizers import make_tokenizer
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.config import DataConfig, LayoutConfig, PackConfig, SourceConfig
from vlm_nemo.data.layout.images import LAYOUTS
from vlm_nemo.data.layout.spec import image_spec, view_tokens
from vlm_nemo.data.layout.tiles import INDICATORS
from vlm_nemo.data.lengths import fingerprint, lengths_path, measure, write_lengths
from vlm_nemo.data.loader import Loader
from vlm_nemo.data.sample import TOO_LONG, ShardImage, ShardSample
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.storage.write import write_shard
from vlm_nemo.data.tokenizer import Tokenizer

FAKES = ["<fake_token_around_image>", "<global-img>"]
CASES: dict[str, tuple[LayoutConfig, dict[str, Any]]] = {
    "square": (LayoutConfig(before="\n\n<img>", after="</img>\n\n"), {}),
    "anyres": (LayoutConfig(kind="anyres", pinpoints=PINPOINTS), {}),
    "anyres scaled down": (LayoutConfig(kind="anyres", pinpoints=PINPOINTS, max_unpadded=2), {}),
    "tiles": (LayoutConfig(kind="tiles", max_tiles=6, before="<img>", after="</img>"), {"reduce": "pixel_shuffle"}),
    "canvas": (LayoutConfig(kind="canvas", max_tiles=4), {"cross_attention": True}),
    "ovis": (LayoutConfig(kind="ovis", max_tiles=6), {"reduce": "hidden_stride"}),
    "rows": (LayoutConfig(kind="rows", longest_edge=4 * SIDE), {"reduce": "pixel_shuffle"}),
    "native": (_NATIVE, {"reduce": "merge", "mrope": True}),
}
SIZES = [(97, 101), (64, 300), (333, 57), (30, 30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    names = ["<img>", "</img>", "<|vision_start|>", "<|vision_end|>", *CHATML, *FAKES, *ROWS, *INDICATORS]
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), names)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No image, one, two; odd sizes; and one that names four."""
    samples = []
    for i in range(24):
        count = 4 if i == 7 else i % 3
        sizes = [SIZES[(i + j) % 4] for j in range(count)]
        shown = [ShardImage(picture(i + j, size, "PNG"), "png", *size) for j, size in enumerate(sizes)]
        text = "<image>\n" * (count // 2) + "What is it? " + "<image>" * (count - count // 2) + " Look."
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "red " * (1 + i % 5)}]
        samples.append(ShardSample(f"{i:03d}", messages, None, str(i), shown))  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("layouts") / "talk"
    folder.mkdir()
    write_shard(folder / "00000.tar", samples)
    finish_folder(folder, [len(samples)])
    return folder


def test_every_layout_is_here() -> None:
    assert {layout.kind for layout, _ in CASES.values()} == set(LAYOUTS)


@pytest.mark.parametrize("name", CASES)
def test_lengths_plans_and_images_agree(name: str, source: Path, tokenizer: Tokenizer) -> None:
    layout, changes = CASES[name]
    spec = image_spec(layout, size=SIDE, patch=PATCH, factor=2, **changes)
    cfg = DataConfig(
        sources={"talk": SourceConfig(path=str(source))},
        template="chatml",
        pack=PackConfig(capacity=200, pool=8),
        global_packs=4,
        max_bad_fraction=1.0,
    )
    seen = []
    sidecar = lengths_path(source / "00000.tar", fingerprint(tokenizer, TEMPLATES["chatml"], layout))
    sidecar.unlink(missing_ok=True)  # of another layout with the same words around its images
    for measured in (False, True):
        if measured:
            folder = ShardFolder(source)
            records = [folder.record(i) for i in range(len(folder))]
            write_lengths(sidecar, measure(records, tokenizer, TEMPLATES["chatml"], layout))
        with closing(Loader(cfg, spec, tokenizer, seed=1, max_tokens=200, dp_rank=0, dp_size=1)) as loader:
            steps = [loader.next() for _ in range(4)]
        assert not any(step.local_drops for step in steps), "what was planned was also what was read"
        drops = [drop.reason for step in steps for drop in step.planned_drops]
        assert set(drops) <= {TOO_LONG}
        seen.append([(step.keys, [b.tokens.tolist() for b in step.batches], step.seen) for step in steps])
        rows = [batch for step in steps for batch in step.batches]
        for batch in rows:
            images = batch.images
            assert images.grids.prod(dim=1).sum() == len(images.patches) and images.views.sum() == len(images.grids)
            tokens = sum(view_tokens(spec, (down, across)) for down, across in images.grids.tolist())
            assert images.embeddings.sum() == tokens
            extra = {tokenizer.special(mark) for mark in INDICATORS} if layout.kind == "ovis" else set()
            standing = [i for i, token in enumerate(batch.tokens.tolist()) if token in {tokenizer.image_id, *extra}]
            assert images.slots.tolist() == standing, "no image is cut, and none is without its place"
            assert len(images.sources) == (0 if spec.cross_attention else len(standing))
            assert len(images.sources) == 0 or images.sources.max() < images.embeddings.sum()
            assert batch.positions.shape == (3, 200)
            assert (batch.positions[0] != batch.positions[2]).any() == (name == "native" and images.count > 0)
        assert {row.images.count == 0 for row in rows} <= {True, False} and any(row.images.count for row in rows)
        if name in ("rows", "anyres"):
            assert TOO_LONG in drops, "the sample of four images has no room, and is left out whole"
    assert seen[0] == seen[1], "lengths change nothing but the speed"


def test_the_words_around_an_image_are_part_of_a_length(tokenizer: Tokenizer) -> None:
    template = TEMPLATES["chatml"]
    names = {fingerprint(tokenizer, template, layout) for layout, _ in CASES.values()}
    assert len(names) == 4, "none, and three of them"
    plain = fingerprint(tokenizer, template, LayoutConfig())
    assert plain == fingerprint(tokenizer, template, LayoutConfig(kind="rows", longest_edge=99)), "tokens of images"
