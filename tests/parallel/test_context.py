"""Ranks that share a row along its length train like one process: losses, gradient norms and gradients of every part.

Images lie unevenly over the row: all on one rank's tokens, none at all, over the border between two ranks' tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import compositions, tiny
from tests.compositions import Composition
from tests.model import looking
from tests.ranks import run_ranks
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import PackedBatch

STEPS = 5
RATES: dict[str, dict[str, float]] = {
    "none frozen": dict(vision_lr=1e-2, projector_lr=1e-2, language_lr=1e-2),
    "stage 1": dict(projector_lr=2e-2),
}
GEMMA = Composition(tower="siglip", reduction="none", projector="gemma", language="gemma3")
QWEN = Composition(tower="qwen25_vit", reduction="merge", projector="mlp", language="qwen2_vl", layout="native")
MODELS = {
    "tiny": tiny.tiny_model,
    "tied": lambda: tiny.tiny_model(tied_embeddings=True),
    "gemma": GEMMA.config,
    "qwen": QWEN.config,
    "looking": looking.looking_model,
}
CASES = [("tiny", "none frozen"), ("tiny", "stage 1"), *((name, "none frozen") for name in list(MODELS)[1:])]
PLAIN = dict(distributed_optimizer=False)
TWO: dict[str, dict[str, Any]] = {
    "cp2": dict(context=2, **PLAIN),
    "cp2_recompute_distopt": dict(context=2, recompute="full"),
}
FOUR: dict[str, dict[str, Any]] = {
    "cp2_tp2_sp": dict(context=2, tensor=2, sequence=True, **PLAIN),
    "cp2_pp2": dict(context=2, pipeline=2, **PLAIN),
    "cp2_pp2_vpp2": dict(context=2, pipeline=2, virtual=2, **PLAIN),
    "cp2_dp2_distopt": dict(context=2),
    "cp4": dict(context=4, **PLAIN),
}
CHOSEN = [
    ("cp2_tp2_sp", ("tiny", "none frozen")),
    ("cp2_tp2_sp", ("gemma", "none frozen")),
    ("cp2_pp2", ("tied", "none frozen")),
    ("cp2_pp2", ("looking", "none frozen")),
    ("cp2_pp2_vpp2", ("tiny", "stage 1")),
    ("cp2_dp2_distopt", ("qwen", "none frozen")),
    ("cp4", ("gemma", "none frozen")),
]
Case = tuple[str, str]
Found = tuple[list[tuple[float, float]], dict[str, float]]
"""(loss, gradient norm) of every step; of the first, module -> largest gradient, or largest difference from those"""


def rows(name: str, cfg: ModelConfig, step: int) -> list[PackedBatch]:
    """Four rows of a step."""
    if name == "looking":
        chosen = (looking.SAMPLES, looking.SAMPLES[1:2], looking.SAMPLES[::-1], looking.SAMPLES[2:])
        return [looking.row(samples, 32) for samples in chosen]
    if name in ("gemma", "qwen"):
        return compositions.rows(cfg, 4, 1000 * step, capacity=88)
    s = 100 * step
    return [
        tiny.row([tiny.sample(s, 17, 3), tiny.sample(s + 1, 30, 0)], 48),  # all images in the first chunks
        tiny.row([tiny.sample(s + 2, 48, 0)], 48),  # a sample over all chunks, no image
        tiny.row([tiny.sample(s + 3, 9, 0), tiny.sample(s + 4, 31, 2)], 48),  # an image at tokens 10 to 13, a cut at 12
        tiny.row([tiny.sample(s + 5, 29, 0), tiny.sample(s + 6, 16, 2)], 48),  # all images in the last
    ]


def train(parallel: ParallelConfig, case: Case, folder: Path) -> Found:
    """The first process to train a case leaves its gradients in `folder`."""
    from vlm_nemo.check import trial
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step

    name, frozen = case
    cfg, rates = MODELS[name](), OptimConfig(**RATES[frozen], weight_decay=0.1, clip_grad=1.0)  # type: ignore[arg-type]
    witness = folder / f"{name} {frozen}.safetensors"
    history: list[tuple[float, float]] = []
    compared: dict[str, float] = {}
    ranks = groups.lay_out(parallel, seed=0)
    chunks = build_model(cfg, parallel, "fp32", seed=0)
    for chunk in chunks:
        for key, parameter in chunk.named_parameters():
            if key.endswith("_gate"):  # they start at zero, where the image has no say
                torch.nn.init.constant_(parameter, 0.6)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(rates, parallel, "fp32", model)
    step.prepare_model(model)
    for number in range(1, STEPS + 1):
        mine = rows(name, cfg, number)[ranks.data_rank :: ranks.data]
        place = (ranks.context_rank, ranks.context)
        batches = [model_batch(r, cfg, image_token=tiny.IMAGE, device=device.device(), context=place) for r in mine]
        optim.set_rates(optimizer, rates, number, STEPS)
        result = step.train_step(model, optimizer, batches, 0.0 if number == 1 else rates.clip_grad)
        speaks = ranks.last_stage and ranks.tensor_rank == 0
        total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
        assert result.applied
        history.append((total / count, result.grad_norm))
        if number == 1:
            trial.gather_gradients(model)
            look = trial.compared if witness.exists() else trial.written
            compared = look(chunks, witness)
    return history, compared


def train_all(chosen: list[tuple[dict[str, Any], Case]], folder: Path) -> list[Found]:
    from vlm_nemo.runtime import device, groups

    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        found = [train(ParallelConfig(**layout), case, folder) for layout, case in chosen]
        groups.stop()
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Case, Found]]:
    """Histories and largest gradients; and the folder of the gradients."""
    folder = tmp_path_factory.mktemp("witness")
    found = run_ranks(train_all, 1, [(PLAIN, case) for case in CASES], folder)[0]
    return folder, dict(zip(CASES, found, strict=True))


def agree(world: int, chosen: list[tuple[str, Case]], one_process: tuple[Path, dict[Case, Found]]) -> None:
    folder, truth = one_process
    ranks = run_ranks(train_all, world, [((TWO | FOUR)[name], case) for name, case in chosen], folder)
    for number, (name, case) in enumerate(chosen):  # a later stage may hold nothing that learns
        modules = {module for found in ranks for module in found[number][1]}
        assert modules == set(truth[case][1]), (name, case)
    for found in ranks:
        for (name, case), (history, off) in zip(chosen, found, strict=True):
            true_history, largest = truth[case]
            for step, (pair, true_pair) in enumerate(zip(history, true_history, strict=True)):
                assert pair == pytest.approx(true_pair, rel=1e-5), (name, case, step)
            for module, difference in off.items():
                assert difference < 1e-4 * largest[module], (name, case, module)


def test_two_ranks_share_rows(one_process: tuple[Path, dict[Case, Found]]) -> None:
    agree(2, [("cp2", case) for case in CASES] + [("cp2_recompute_distopt", CASES[0])], one_process)
    for history, _ in one_process[1].values():
        assert len({loss for loss, _ in history}) == STEPS, "equal constants would prove nothing"


def test_four_ranks_share_rows_and_layers(one_process: tuple[Path, dict[Case, Found]]) -> None:
    agree(4, CHOSEN, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_model_at_every_layout(world: int, one_process: tuple[Path, dict[Case, Found]]) -> None:
    agree(world, [(name, case) for name in (TWO if world == 2 else FOUR) for case in CASES], one_process)


def test_borders_cut_images() -> None:
    """What the rows above are made for."""
    from vlm_nemo.model.batch import model_batch

    for name in ("tiny", "gemma"):
        cfg = MODELS[name]()
        cut = 0
        for row in rows(name, cfg, 1):
            starts = [0, *(row.images.slots.diff() != 1).nonzero().flatten().add(1).tolist(), len(row.images.slots)]
            runs = [row.images.slots[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
            batch = model_batch(row, cfg, image_token=tiny.IMAGE, device=torch.device("cpu"), context=(0, 2))
            assert batch.segments.reach is not None
            held = set(batch.segments.reach.order[: len(row.tokens) // 2].tolist())
            cut += sum(0 < len(held & set(run)) < len(run) for run in runs)
        assert cut, name
