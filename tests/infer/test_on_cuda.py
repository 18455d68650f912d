"""Generation on CUDA, on tensors without memory (tests/pretended.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests import compositions
from tests.on_cuda import Case, alone, asked, build
from tests.pretended import Attention, pretend
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.torch_backend import TorchBackend
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import Images


def generated(guard: Path) -> set[Attention]:
    """A prompt with an image and one without; then both go on, beside a new prompt."""
    case = Case(tower="siglip", reduction="average_pool", projector="gemma", language="gemma3")

    def go_on(slot: int, start: int, *tokens: int) -> Row:
        return Row(slot=slot, start=start, tokens=tokens)

    FakeTensor.numpy = lambda tensor: np.zeros(tensor.shape, dtype=np.float32)
    with pretend(guard) as gpu:
        run = build(gpu, case)
        (chunk,), ranks = run.model, groups.lay_out(ParallelConfig(), seed=0)
        backend = TorchBackend(chunk.module, run.cfg, ranks, compositions.IMAGE, slots=4, capacity=64)
        picture = compositions.rows(run.cfg, 1, 0, capacity=96, images=[(1,)])[0]
        images = Images(**{name: None if x is None else x.numpy() for name, x in vars(picture.images).items()})
        prompt = Row(slot=0, start=0, tokens=picture.tokens[: picture.used_tokens].tolist(), images=images)
        start = picture.used_tokens
        for rows in (
            [prompt, go_on(1, 0, *range(5, 25))],
            [go_on(2, 0, 5, 6, 7), go_on(0, start, 7), go_on(1, 20, 8, 9)],
            [go_on(0, start + 1, 7), go_on(2, 3, 9)],
        ):
            batch = backend._batch(rows)
            backend._batch = partial(lambda made, rows: made, batch)  # type: ignore[method-assign]
            with gpu.running(), torch.no_grad():
                assert backend._logits(rows).shape == (len(rows), run.cfg.language.vocab_size)
            del backend._batch
        return {replace(call, segments=0) for call in gpu.attention}


def test_generation(guard: Path) -> None:
    """Prompts through the variable-length kernel, the rest through the cache, all of it on the device."""
    assert alone(generated, guard) == {asked(), asked(window=(7, 0))}
