"""The key/value cache of generation, and attention through it, for packed rows of prompts and single tokens.

A step is one row of tokens, as in training; it begins with whole prompts, then come the tokens that go on behind what
their slots hold already:

    tokens    p p p p | q q | a | b        two prompts into slots 0 and 3, one more token for slots 1 and 2
    position  0 1 2 3 | 0 1 | 7 | 4

Prompts attend inside themselves exactly as samples do in training. The others attend to their slot of the cache. A
block of tokens that see one another (an image's, in Gemma 3) lies within one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import functional as F

from vlm_nemo.model.looks import Looks, look_at
from vlm_nemo.model.segments import Segments, block_runs, make_segments


class KVCache:
    """Keys and values of up to `slots` sequences of up to `capacity` tokens, for the layers and heads of this rank.

    A layer's tensors, [slots, capacity, kv_heads, d] each, are made when it is first used and grow with what they
    hold: one question to a model of 4096 positions must not take the memory of sixteen full conversations.
    `reserve` makes them whole from the first: a server shall find out at its start whether they fit.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.images: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        """Of every layer that looks at images, by slot: keys and values of the image that its last token sees."""
        self.looking: set[int] = set()
        """Slots whose last token stands behind an image."""
        self._held = (0, 0)

    def reserve(self) -> None:
        """From now on every layer has room for all slots and all tokens."""
        self._held = (self.slots, self.capacity)

    def make_room(self, slots: int, tokens: int) -> None:
        """Before a step whose highest slot is slots - 1 and whose longest sequence has `tokens`."""
        assert slots <= self.slots and tokens <= self.capacity, f"{slots} slots of {tokens} tokens"
        had, long = self._held
        # Twice as much at a time, so that growing costs less than what it makes room for
        slots = had if slots <= had else min(self.slots, max(slots, 2 * had))
        tokens = long if tokens <= long else min(self.capacity, max(tokens, 2 * long))
        self._held = (slots, tokens)

    def write(self, layer: int, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put tokens [T, kv_heads, d] where they belong; the whole layer's keys and values."""
        shape = (*self._held, *k.shape[1:])
        there = self._layers.get(layer)
        if there is None or there[0].shape != shape:
            # Zeros, not empty memory: what is masked is still multiplied by zero, and zero times NaN is NaN
            grown = (k.new_zeros(shape), v.new_zeros(shape))
            if there is not None:
                for new, old in zip(grown, there, strict=True):
                    new[: old.shape[0], : old.shape[1]] = old
            self._layers[layer] = grown
        keys, values = self._layers[layer]
        keys[slots, positions] = k
        values[slots, positions] = v
        return keys, values


@dataclass
class CachedStep(PackedSeqParams):
    """Where the tokens of one step lie; stands where Segments stands in training. Tensors on the model's device."""

    cache: Any = None
    """The KVCache."""
    slots: Tensor | None = None
    """[T] int64: the slot of every token"""
    positions: Tensor | None = None
    """[T] int64: its place in the slot"""
    prompt_tokens: int = 0
    """How many tokens, from the first, belong to whole prompts."""
    prompts: Segments | None = None
    """Where those prompts lie; None without any"""
    rows: Tensor | None = None
    """[R] int64: the slots of the rows that go on"""
    contiguous: slice | None = None
    """The same slots as a slice, where they are one"""
    longest: int = 0
    """The most tokens that one of these slots holds, the new ones included."""
    queries: Tensor | None = None
    """[R, n] int64: the row's tokens among the T; short rows repeat their last one"""
    visible: Tensor | None = None
    """[R, 1, n, longest] bool: what each query may see"""
    places: Tensor | None = None
    """[R, 1, n, 1] int64: where each query stands in its slot"""
    near: Tensor | None = None
    """[R, 1, n, longest] bool: what each query may see in a layer with a window; made when first asked for"""
    row_of_token: Tensor | None = None
    """[tokens that go on] int64: where the answer to each lies in the flattened [R, n]"""
    looks: Looks | None = None
    """Who attends to which image of this step; tokens in front of those see what their slot remembers."""
    spans: list[tuple[int, int, int, bool]] = field(default_factory=list)
    """Of every row: slot, its first token among the T, the one behind its last, whether it is a whole prompt"""
    last: Tensor | None = None
    """[rows] int64: the last token of every row, in the order of the rows: whose logits are wanted"""

    def seen(self, window: int | None) -> Tensor:
        """What each query may see: all before it, or the nearest `window` tokens of that, itself included."""
        assert self.visible is not None and self.places is not None
        if window is None or window >= self.longest:
            return self.visible
        if self.near is None:
            keys = torch.arange(self.longest, device=self.places.device)
            self.near = self.visible & (keys > self.places - window)
        return self.near

    def remembered(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
        """Of a layer that looks at images: the tokens [start, stop) that see an image of an earlier step, and its keys
        and values. This step's own, k and v [E, 1, kv_heads, d], are remembered."""
        assert self.looks is not None
        images = self.cache.images.setdefault(layer, {})
        found = []
        for slot, start, stop, prompt in self.spans:
            own = [look for look in self.looks.ranges if start <= look[0] < stop]
            if prompt:
                images.pop(slot, None)
            elif slot in images and (not own or own[0][0] > start):
                found.append((start, own[0][0] if own else stop, *images[slot]))
            if own:
                spans = own[-1][2]
                images[slot] = look_at(k, spans).clone(), look_at(v, spans).clone()
        return found


def cached_step(
    cache: KVCache,
    rows: list[tuple[int, int, int]],
    device: torch.device,
    blocks: Tensor | None = None,
    looks: Looks | None = None,
) -> CachedStep:
    """Lay out a step. rows: (slot, start, tokens), the prompts (start 0) first. blocks: [T] as in `make_segments`.
    looks: of the step's images, each row a sample."""
    fresh = [n for _, start, n in rows if start == 0]
    going = [row for row in rows if row[1] > 0]
    assert [row[1] for row in rows[: len(fresh)]] == [0] * len(fresh), "prompts come first"
    cache.make_room(1 + max(slot for slot, _, _ in rows), max(start + n for _, start, n in rows))
    slots = torch.cat([torch.full((n,), slot) for slot, _, n in rows])
    positions = torch.cat([torch.arange(start, start + n) for _, start, n in rows])
    ends = torch.tensor([n for _, _, n in rows]).cumsum(0)
    step = CachedStep(
        qkv_format="sbhd",  # see segments.py
        cache=cache,
        slots=slots.to(device),
        positions=positions.to(device),
        prompt_tokens=sum(fresh),
        last=(ends - 1).to(device),
    )
    if looks is not None:
        bounds = [0, *ends.tolist()]
        step.spans = [(slot, *bounds[i : i + 2], start == 0) for i, (slot, start, _) in enumerate(rows)]
        step.looks = _looking_on(cache, step.spans, looks).moved(lambda x: x.to(device))
    if fresh:
        cu = torch.tensor([0, *fresh], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        own = blocks[: sum(fresh)] if blocks is not None else None
        step.prompts = make_segments(cu, sum(fresh), blocks=own).moved(lambda x: x.to(device))
    if going:
        numbers = [slot for slot, _, _ in going]
        first, most = ends[len(fresh) - 1].item() if fresh else 0, max(n for _, _, n in going)
        step.longest = max(start + n for _, start, n in going)
        step.rows = torch.tensor(numbers, device=device)
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            step.contiguous = slice(numbers[0], numbers[0] + len(numbers))
        queries = torch.empty(len(going), most, dtype=torch.int64)
        row_of_token: list[int] = []
        at = int(first)
        for row, (_, _, n) in enumerate(going):
            queries[row] = torch.arange(at, at + most).clamp(max=at + n - 1)
            row_of_token += range(row * most, row * most + n)
            at += n
        reach = positions.clone()
        for _, start, end in block_runs(blocks, [0, *ends.tolist()]) if blocks is not None else ():
            reach[start:end] = positions[end - 1]
        visible = torch.arange(step.longest) <= reach[queries][:, None, :, None]
        step.queries, step.visible = queries.to(device), visible.to(device)
        step.places = positions[queries][:, None, :, None].to(device)
        step.row_of_token = torch.tensor(row_of_token, device=device)
    return step


def _looking_on(cache: KVCache, spans: list[tuple[int, int, int, bool]], looks: Looks) -> Looks:
    """The looks of a step, where tokens that go on behind an image see it; the cache learns who sees one."""
    seen, dropped = looks.seen.clone(), set()
    for slot, start, stop, prompt in spans:
        if prompt:
            cache.looking.discard(slot)
        elif slot in cache.looking:
            seen[start:stop] = True
        if not prompt:  # in front of its own image, a row that goes on sees the earlier one, or nothing
            dropped |= {look for look in looks.ranges if look[0] == start and not looks.seen[start]}
        if bool(seen[stop - 1]):
            cache.looking.add(slot)
    return Looks(ranges=tuple(look for look in looks.ranges if look not in dropped), seen=seen)


def attend_to_cache(
    q: Tensor, step: CachedStep, keys: Tensor, values: Tensor, scale: float | None, window: int | None = None
) -> Tensor:
    """The tokens that go on. q: [T, heads, d] of the whole step -> [their number, heads, d].

    keys, values: [slots, capacity, kv_heads, d]. window: how many tokens a query sees; None: all.
    """
    assert step.queries is not None and step.rows is not None
    which = step.contiguous if step.contiguous is not None else step.rows
    k, v = (x[which, : step.longest].transpose(1, 2) for x in (keys, values))
    rows, n = step.queries.shape
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    asked = q[step.queries].transpose(1, 2)  # [R, heads, n, d]
    visible = step.seen(window)
    if n == 1:  # the queries that share a key/value head become its rows: nothing is repeated
        asked = asked.reshape(rows, kv_heads, groups, -1)
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(asked, k, v, attn_mask=visible, scale=scale)
    out = out.reshape(rows, q.shape[1], n, -1).transpose(1, 2).reshape(rows * n, q.shape[1], -1)
    return out[step.row_of_token]
