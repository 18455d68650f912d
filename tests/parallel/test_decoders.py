"""Every kind of decoder under every layout: transformers' logits, and one process's losses and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.model import decoders
from tests.model.decoders import KINDS
from tests.ranks import run_ranks
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig

LAYOUTS: dict[str, dict[str, object]] = {
    "tp2": dict(tensor=2),
    "tp2_sp_recompute": dict(tensor=2, sequence=True, recompute="full"),
    "pp2": dict(pipeline=2),
    "pp2_vpp2_recompute": dict(pipeline=2, virtual=2, recompute="full"),
}


SPLIT = ["tp2_sp_recompute", "pp2_vpp2_recompute"]
PLAIN = ["tp2", "pp2"]
SOME = {name: [SPLIT[i % 2], PLAIN[(i + 1) % 2]] for i, name in enumerate(KINDS)}
"""A layout over tensor ranks and one over stages for each kind; of two neighbours each layout has one."""


def check(chosen: dict[str, list[str]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Compares logits here; returns the history of training of every layout and kind."""
    histories = {}
    with device.adapter():
        for layout in LAYOUTS:
            parallel = ParallelConfig(distributed_optimizer=False, **LAYOUTS[layout])  # type: ignore[arg-type]
            groups.start(parallel, seed=0)
            for name in [name for name, layouts in chosen.items() if layout in layouts]:
                kind = KINDS[name]
                hf = kind.twin()
                chunks = decoders.build(kind, hf, parallel)
                samples = kind.with_logits(hf)
                for these in (samples, samples[1:2]):
                    expected = torch.cat([sample.logits for sample in these])
                    batch = decoders.row(kind, these, (len(expected) + 7) // 2 * 2)
                    found = decoders.run(chunks, batch, parallel)
                    if found is not None:
                        assert (found[: len(expected)] - expected).abs().max() < 1e-4, (layout, name)
                histories[layout, name] = decoders.train(kind, hf, parallel)
    return histories


@pytest.mark.parametrize(
    "chosen", [SOME, pytest.param(dict.fromkeys(KINDS, list(LAYOUTS)), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_layouts_equal_transformers_and_one_process(chosen: dict[str, list[str]]) -> None:
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        alone = ParallelConfig(distributed_optimizer=False)
        truth = {name: decoders.train(kind, kind.twin(), alone) for name, kind in KINDS.items()}
        groups.stop()
    ranks = run_ranks(check, 2, chosen)
    for (layout, name), history in ranks[1].items():  # the last stage, or any tensor rank
        for step, (found, true) in enumerate(zip(history, truth[name], strict=True)):
            assert found == pytest.approx(true, rel=1e-5), (layout, name, step)
    for name, history in truth.items():
        losses = [loss for loss, _ in history]
        assert losses[-1] < losses[0], f"{name} does not learn: equal constants would prove nothing"
