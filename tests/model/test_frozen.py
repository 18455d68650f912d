"""What a frozen part does not do: keep activations, or compute gradients of its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device
from vlm_nemo.runtime.config import ParallelConfig

pytestmark = pytest.mark.usefixtures("one_process")


def built(*trained: str, **layout: Any) -> tuple[VLM, ModelBatch]:
    cfg = tiny.tiny_model()
    (model,) = build_model(cfg, ParallelConfig(**layout), "fp32", seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in trained)
    return model.train(), model_batch(tiny.rows(1, capacity=80)[0], cfg, image_token=tiny.IMAGE, device=device.device())


def kept(function: Any, *given: Any) -> int:
    """Tensors that a forward pass keeps for the backward pass."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        function(*given)
    return len(found)


def test_a_frozen_tower_keeps_no_activations() -> None:
    model, batch = built("projector", "language")
    with torch.no_grad():
        features = model.vision(batch.views)
    everything = kept(model.embed_images, batch.views)
    assert everything == kept(model.projector, features, batch.views.grids) > 0
    learning, batch = built("vision", "projector", "language")
    assert kept(learning.embed_images, batch.views) > everything


def test_a_tower_that_recomputes_keeps_its_layers_inputs() -> None:
    plain, batch = built("vision", "projector", "language")
    again, _ = built("vision", "projector", "language", recompute_vision="full")
    assert kept(again.vision, batch.views) < kept(plain.vision, batch.views) / 3
    losses = []
    for model in (plain, again):
        model(batch).sum().backward()
        losses.append([p.grad for p in model.vision.parameters()])
    for one, other in zip(*losses, strict=True):
        assert one is not None and torch.equal(one, other)


class Products(TorchDispatchMode):
    """Shapes of the matrix products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(("trained", "learns"), [(("projector",), False), (("projector", "language"), True)])
def test_a_frozen_decoder_computes_no_gradient_of_its_weights(trained: tuple[str, ...], learns: bool) -> None:
    """Stage 1: the projector learns through a decoder that does not."""
    model, batch = built(*trained)
    weights = [p for p in model.language.parameters() if p.ndim == 2]
    shapes = {shape for p in weights for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    assert not any(batch.tokens.shape[1] in shape or len(batch.supervised) in shape for shape in shapes)
    with Products() as products:
        model(batch).sum().backward()
    of_weights = [shape for shape in products.shapes if shape in shapes]
    # The projector's last matrix has the width of the decoder on both sides
    mine = [tuple(p.shape) for p in model.projector.parameters() if p.ndim == 2 and tuple(p.shape) in shapes]
    matrices = len(weights) - 1  # the embedding's gradient is no product
    assert len(of_weights) == (matrices if learns else 0) + len(mine)
    assert all(p.grad is not None for p in model.projector.parameters())
