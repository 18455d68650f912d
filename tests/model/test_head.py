"""The chunked loss of supervised tokens against torch's own cross entropy over all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tests.ranks import run_ranks
from vlm_nemo.check.meter import Meter
from vlm_nemo.model import head
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import IGNORE_INDEX

TOKENS, WIDTH, WORDS = 23, 16, 40


class Alone:
    """A tensor group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def made(dtype: torch.dtype = torch.float32, words: int = WORDS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, labels."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(TOKENS, WIDTH, generator=g) * 2).to(dtype).requires_grad_()
    weight = torch.randn(words, WIDTH, generator=g).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, words, (TOKENS,), generator=g)


def close(found: Tensor, wanted: Tensor, within: float = 1e-6) -> bool:
    return float((found - wanted).detach().abs().max()) <= within * float(wanted.detach().abs().max())


@pytest.mark.parametrize("chunk", [WORDS, 5 * WORDS, 2**26])
@pytest.mark.parametrize("uneven", [False, True])
def test_losses_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, chunk: int, uneven: bool) -> None:
    """uneven: a gradient for each token, not one for their sum."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    x, weight, labels = made()
    scales = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) if uneven else torch.ones(TOKENS)
    truth = F.cross_entropy(x @ weight.t(), labels, reduction="none")
    wanted = torch.autograd.grad((truth * scales).sum() * 3, (x, weight))
    losses = head.token_losses(x, weight, labels, torch.ones(TOKENS), Alone())
    found = torch.autograd.grad(((losses * scales) if uneven else losses).sum() * 3, (x, weight))
    assert close(losses, truth)
    for one, other in zip(found, wanted, strict=True):
        assert close(one, other)


def test_a_gradient_asked_for_twice_is_the_same() -> None:
    x, weight, labels = made()
    total = head.token_losses(x, weight, labels, torch.ones(TOKENS), Alone()).sum()
    first = torch.autograd.grad(total, (x, weight), retain_graph=True)
    for one, other in zip(torch.autograd.grad(total, (x, weight)), first, strict=True):
        assert close(one, other)


def test_a_stand_in_weighs_nothing_and_still_brings_gradients() -> None:
    targets = head.targets_of(torch.full((TOKENS,), IGNORE_INDEX))
    assert [t.tolist() for t in targets] == [[0], [0], [0.0]]
    x, weight, _ = made()
    losses = head.token_losses(x[targets.rows], weight, targets.labels, targets.weights, Alone())
    assert losses.tolist() == [0.0]
    losses.sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_a_frozen_head_makes_no_gradient_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = made()
    products: list[tuple[int, ...]] = []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: products.append(k["out"].shape) or real(*a, **k))
    losses = head.token_losses(x, weight.detach(), labels, torch.ones(TOKENS), Alone())
    losses.sum().backward()
    assert products == [x.shape]
    products.clear()
    with torch.no_grad():
        head.token_losses(x, weight, labels, torch.ones(TOKENS), Alone())
    assert products == []


@pytest.mark.parametrize("chunk", [5 * WORDS, 2**26])
def test_half_precision_adds_up_in_fp32(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    x, weight, labels = made(torch.bfloat16)
    logits = (x @ weight.t()).float()
    losses = head.token_losses(x, weight, labels, torch.ones(TOKENS), Alone())
    assert losses.dtype is torch.float32
    assert close(losses, F.cross_entropy(logits, labels, reduction="none"))
    whole = F.cross_entropy(x.float() @ weight.float().t(), labels, reduction="sum")
    wanted = torch.autograd.grad(whole, (x, weight))
    for one, other in zip(torch.autograd.grad(losses.sum(), (x, weight)), wanted, strict=True):
        assert one.dtype is torch.bfloat16
        assert close(one.float(), other.float(), 2e-2)


@pytest.mark.parametrize("words", [32_000, 152_064])
def test_memory_is_one_chunks(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    """Counted without running: whatever the number of tokens, one chunk of logits and one copy of it in the making."""
    tokens, width = 4096, 64
    monkeypatch.setattr(head, "CHUNK", 2**22)
    with torch.device("meta"):
        x = torch.empty(tokens, width, requires_grad=True)
        weight = torch.empty(words, width, requires_grad=True)
        labels, ones = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
    meter = Meter()
    there = meter.include((x, weight, labels, ones))
    with meter:
        head.token_losses(x, weight, labels, ones, Alone()).sum().backward()
    gradients = weight.nbytes + x.nbytes
    chunk, beside = 4 * 2**22, 100 * tokens
    assert chunk / 2 < meter.peak - there - gradients < chunk + beside
    every = Meter()
    every.include((x, weight, labels, ones))
    with every:
        F.cross_entropy(x @ weight.t(), labels, reduction="none").sum().backward()
    assert every.peak - there - gradients > 2 * 4 * tokens * words


def on_ranks(sequence: bool, frozen: bool) -> tuple[float, float, float]:
    """Largest differences on this rank of losses and of the gradients of hidden states and weight from one process."""
    parallel = ParallelConfig(tensor=2, sequence=sequence)
    head.CHUNK = 3 * WORDS // 2
    labels = torch.full((24,), IGNORE_INDEX)
    with device.adapter():
        ranks = groups.start(parallel, seed=0)
        x, weight, words = made()
        labels[1:TOKENS:2] = words[1::2]
        targets = head.targets_of(labels)
        whole = torch.cat((x, torch.ones(1, WIDTH)))
        truth = F.cross_entropy(whole @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="none")[targets.rows]
        wanted_x, wanted_weight = torch.autograd.grad(truth.sum() / 7, (x, weight))

        layer = parts(parallel, frozen)
        start = ranks.tensor_rank * (WORDS // 2)
        layer.weight.data.copy_(weight[start : start + WORDS // 2])
        hidden = whole.detach()[:, None]
        mine = slice(None)
        if sequence:
            mine = slice(12 * ranks.tensor_rank, 12 * ranks.tensor_rank + 12)
        hidden = hidden[mine].clone().requires_grad_()
        losses, _ = layer(hidden, targets=targets)
        (losses.sum() / 7).backward()
        assert hidden.grad is not None
        padded = torch.cat((wanted_x, torch.zeros(1, WIDTH)))[mine]
        off = [
            float((losses - truth).abs().max() / truth.abs().max()),
            float((hidden.grad[:, 0] - padded).abs().max() / wanted_x.abs().max()),
        ]
        if frozen:
            assert layer.weight.grad is None
            return off[0], off[1], 0.0
        gradient = wanted_weight[start : start + WORDS // 2]
        return off[0], off[1], float((layer.weight.grad - gradient).abs().max() / gradient.abs().max())


def parts(parallel: ParallelConfig, frozen: bool) -> head.Head:
    from vlm_nemo.model.transformer import transformer_config

    sizes = dict(num_layers=1, hidden_size=WIDTH, num_attention_heads=2)
    config = transformer_config(parallel, torch.float32, pipelined=True, **sizes)
    layer = head.Head(WIDTH, WORDS, config=config, init_method=lambda w: w, bias=False)
    layer.weight.requires_grad_(not frozen)
    return layer


def all_on_ranks() -> list[tuple[float, float, float]]:
    found = [on_ranks(sequence, frozen) for sequence in (False, True) for frozen in (False, True)]
    dist.barrier()
    return found


def test_two_tensor_ranks_equal_one() -> None:
    for rank in run_ranks(all_on_ranks, 2):
        assert len(rank) == 4
        for off in rank:
            assert max(off) < 1e-5, rank
