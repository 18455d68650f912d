"""Any tower, reduction, projector and decoder train alike at every layout: compositions drawn with a fixed seed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import compositions
from tests.compositions import Composition
from tests.ranks import run_ranks
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train.config import OptimConfig

COUNT, SEED, STEPS, ROWS = 30, 2026, 2, 4
EVERY_PART = 12
"""Of these, from the first on: as many as there are projectors."""
REPLICAS = dict(distributed_optimizer=False)
"""Four data-parallel ranks of tensor=1: a row each, the second one's without any image."""
SPLIT = dict(tensor=2, pipeline=2, sequence=True, distributed_optimizer=False)


IMAGES = ((1, 2, 0), (0, 0))
"""Of each sample of a row, the rows taking turns."""


def train(
    composition: Composition, ranks: Ranks, parallel: ParallelConfig, images: tuple[tuple[int, ...], ...]
) -> list[float]:
    """Loss per supervised token of each step, as the whole job sees it."""
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    cfg = composition.config()
    rates = OptimConfig(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2)
    losses = []
    chunks = build_model(cfg, parallel, "fp32", seed=0)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
    step.prepare_model(model)
    for number in range(1, STEPS + 1):
        rows = compositions.rows(cfg, ROWS, 1000 * number, capacity=192, images=images)
        mine = rows[ranks.data_rank :: ranks.data]
        batches = [model_batch(r, cfg, image_token=compositions.IMAGE, device=device.device()) for r in mine]
        optim.set_rates(optimizer, rates, number, STEPS)
        result = step.train_step(model, optimizer, batches, rates.clip_grad)
        speaks = ranks.last_stage and ranks.tensor_rank == 0
        total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
        losses.append(total / count)
    return losses


def train_all(
    drawn: list[Composition], layouts: list[dict[str, object]], images: tuple[tuple[int, ...], ...] = IMAGES
) -> list[list[list[float]]]:
    """Losses by layout and composition. Groups are laid out once a layout: gloo's never end, and each has threads."""
    from vlm_nemo.runtime import device, groups

    found = []
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for layout in layouts:
            parallel = ParallelConfig(**layout)  # type: ignore[arg-type]
            ranks = groups.lay_out(parallel, seed=0)
            found.append([])
            for composition in drawn:
                try:
                    found[-1].append(train(composition, ranks, parallel, images))
                except Exception as error:
                    error.add_note(f"{layout}: {composition}")
                    raise
    return found


@pytest.mark.parametrize("count", [EVERY_PART, COUNT])
def test_what_is_drawn_holds_every_part(count: int) -> None:
    drawn = compositions.draw(COUNT, SEED)[:count]
    assert len(set(drawn)) == count
    for part, names in (
        ("tower", compositions.TOWERS),
        ("reduction", compositions.REDUCTIONS),
        ("projector", compositions.PROJECTORS),
        ("language", compositions.LANGUAGES),
    ):
        assert {getattr(composition, part) for composition in drawn} == set(names)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "these",
    [
        pytest.param(slice(EVERY_PART), id="every part"),
        pytest.param(slice(EVERY_PART, COUNT), id="more", marks=pytest.mark.slow),
    ],
)
def test_compositions_train_alike_whole_and_split(these: slice) -> None:
    """All thirty are two minutes on two idle cores."""
    drawn = compositions.draw(COUNT, SEED)[these]
    for whole, split in run_ranks(train_all, 4, drawn, [REPLICAS, SPLIT], timeout=850):
        compare(drawn, whole, split)


def compare(drawn: list[Composition], whole: list[list[float]], split: list[list[float]]) -> None:
    for composition, one, other in zip(drawn, whole, split, strict=True):
        assert one == pytest.approx(other, rel=1e-5), str(composition)
        assert len(set(one)) == STEPS, f"{composition}: the witness itself must move"


LLAVA = Composition(tower="siglip", reduction="merge", projector="mlp", language="llama")
LAYOUT_KINDS = [
    LLAVA,
    replace(LLAVA, layout="anyres", reduction="none", projector="mlp_newline"),
    replace(LLAVA, layout="tiles", tower="intern_vit", reduction="pixel_shuffle", projector="norm_mlp"),
    replace(LLAVA, layout="ovis", tower="aimv2", reduction="hidden_stride", projector="visual_vocabulary"),
    replace(LLAVA, layout="rows", reduction="pixel_shuffle", projector="linear"),
    replace(LLAVA, layout="native", tower="qwen25_vit", language="qwen2_vl"),
    Composition(layout="canvas", tower="llama32", reduction="none", projector="cross_attention", language="gemma3"),
]
"""One of each kind of layout, with the parts that come with it."""
TEXT_ONLY = ((0, 0), (0, 0, 0))
MIXED = ((0, 0), (1, 1, 0))


@pytest.mark.parametrize("images", [TEXT_ONLY, MIXED], ids=["text only", "with and without images"])
def test_text_and_images_train_together_under_every_layout(images: tuple[tuple[int, ...], ...]) -> None:
    """Of two replicas, rank 0's rows have no image and rank 1's have some, or none of them has: all run the same
    collectives, and come to what two tensor ranks with all the rows come to."""
    tensor = dict(tensor=2, distributed_optimizer=False)
    for whole, split in run_ranks(train_all, 2, LAYOUT_KINDS, [REPLICAS, tensor], images):
        compare(LAYOUT_KINDS, whole, split)
