"""Who writes what: every element of the model and its optimizer once, shared out over all ranks that hold it.

A rank knows what it holds as boxes of global tensors (model/boxes.py) and, under the distributed optimizer, spans of
them. The ranks tell each other what they hold, once, and all of them compute the same shares from it, balanced by
bytes. Nothing here knows of tensor, pipeline, context, expert or data ranks: a layout that describes its boxes rightly
is saved rightly, and one that leaves elements out, or counts them twice, is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from vlm_nemo.model.boxes import Box, LocalParameter
from vlm_nemo.runtime import exchange
from vlm_nemo.train.optim import optimizer_slices
from vlm_nemo.train.tensors import MOMENTS, Chunk, chunk_of, overlaps

WEIGHT, STATE = "weight", "optimizer"
"""What is shared out: the weights; what the optimizer holds of the same elements, which stays together."""
STATE_BYTES = 8
"""An element's two moments in fp32."""
MASTER_BYTES = 4
"""Its fp32 copy, where the weights are of half precision."""

COLUMNS = 9
"""Of a row about something held: box, kind, key, numel, total, apart, start, stop, bytes an element."""

Spans = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Elements [start, stop) of a box that lie in this process's memory."""

    what: str
    """WEIGHT or STATE"""
    box: Box
    start: int
    stop: int
    element_bytes: int
    tensors: dict[str, Tensor]
    """Kind -> [stop - start], flat views of what is trained."""

    @property
    def part(self) -> str:
        """vision | projector | language"""
        return self.box.key.split(".", 1)[0]

    @property
    def key(self) -> tuple[str, int]:
        """What it is, whoever holds it."""
        return self.what, identity(self.box.key, self.box.global_shape, self.box.offset, self.box.shape)


def identity(*words: object) -> int:
    """63 bits that are the same on every rank."""
    return int.from_bytes(hashlib.blake2b(json.dumps(words).encode(), digest_size=8).digest(), "big") >> 1


def held(parameters: Sequence[LocalParameter], optimizer: MegatronOptimizer | None) -> list[Held]:
    """All that this process could write, as it is now: views, no copies."""
    found = list(_weights(parameters))
    if optimizer is not None:
        found += _states(parameters, optimizer)
    return found


def _weights(parameters: Iterable[LocalParameter]) -> Iterator[Held]:
    for local in parameters:
        for box, view in local.pieces(local.parameter.data):
            if box.numel:
                size = view.element_size()
                flat = {WEIGHT: view.reshape(-1)}
                yield Held(what=WEIGHT, box=box, start=0, stop=box.numel, element_bytes=size, tensors=flat)


def _states(parameters: Iterable[LocalParameter], optimizer: MegatronOptimizer) -> Iterator[Held]:
    by_parameter = {id(p.parameter): p for p in parameters}
    for piece in optimizer_slices(optimizer):
        tensors: dict[str, Tensor] = {kind: piece.state[kind] for kind in MOMENTS if kind in piece.state}
        if piece.has_copy:
            tensors["master"] = piece.master.data
        flat = {kind: tensor.detach().reshape(-1) for kind, tensor in tensors.items()}
        size = STATE_BYTES + (MASTER_BYTES if piece.has_copy else 0)
        for box, start, stop, first in overlaps(by_parameter[id(piece.parameter)].boxes, piece.start, piece.stop):
            mine = {kind: tensor[first : first + stop - start] for kind, tensor in flat.items()}
            yield Held(what=STATE, box=box, start=start, stop=stop, element_bytes=size, tensors=mine)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What this rank writes, and what all of them do."""

    mine: dict[tuple[str, int], Spans]
    """What -> the spans of it."""
    loads: dict[str, list[int]]
    """live, frozen -> bytes of each rank."""
    keys: frozenset[int]
    """Identities of the names of all tensors of the whole model."""

    def of(self, mine: Iterable[Held]) -> Iterator[tuple[str, Chunk, Tensor]]:
        """What this rank writes of what it holds: (part, what it is, its values)."""
        said = set()  # a tensor may lie in one rank's memory twice
        for piece in mine:
            for start, stop in self.mine.get(piece.key, ()):
                first, last = max(start, piece.start), min(stop, piece.stop)
                for kind, flat in piece.tensors.items():
                    chunk = chunk_of(kind, piece.box, first, last)
                    if first < last and chunk not in said:
                        said.add(chunk)
                        values = flat[first - piece.start : last - piece.start]
                        whole = kind == WEIGHT and chunk.whole
                        yield piece.part, chunk, values.view(piece.box.shape) if whole else values


def agree(mine: Sequence[Held], frozen: Collection[str]) -> Shares:
    """Share out what all ranks hold; collective. frozen: parts that are written apart from the others, so that each of
    the two is balanced by itself.

    Raises RuntimeError where the boxes or spans of all ranks together are not the model, each element once.
    """
    rows = []
    for piece in mine:
        what, box = piece.key
        total = torch.Size(piece.box.global_shape).numel()
        about_box = (identity(piece.box.key), piece.box.numel, total)
        kind, apart = int(what == STATE), int(piece.part in frozen)
        rows.append((box, kind, *about_box, apart, piece.start, piece.stop, piece.element_bytes))
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS)
    world = dist.get_world_size()
    gathered = exchange.gather_bytes(table.numpy().tobytes(), dist.group.WORLD)
    names = {identity(piece.box.key): piece.box.key for piece in mine}
    holders: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)  # (kind, box) -> start, stop, rank
    about: dict[tuple[int, int], tuple[int, int]] = {}  # (kind, box) -> apart, bytes an element
    boxes: dict[int, tuple[int, int, int]] = {}
    for rank, content in enumerate(gathered):
        found = torch.frombuffer(bytearray(content), dtype=torch.int64).reshape(-1, COLUMNS).tolist() if content else []
        for box, kind, key, numel, total, apart, start, stop, element in found:
            holders[kind, box].append((start, stop, rank))
            about[kind, box] = (apart, element)
            boxes[box] = (key, numel, total)
    _check_boxes(boxes, names)
    loads = {0: [0] * world, 1: [0] * world}
    shares: dict[tuple[int, int], Spans] = defaultdict(list)
    rank = dist.get_rank()
    for entry, start, stop, owner in _owners(holders, about, boxes, names, loads):
        if owner == rank:
            spans = shares[entry]
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
    return Shares(
        mine={((WEIGHT, STATE)[kind], box): spans for (kind, box), spans in shares.items()},
        loads={"live": loads[0], "frozen": loads[1]},
        keys=frozenset(key for key, _, _ in boxes.values()),
    )


def _owners(
    holders: dict[tuple[int, int], list[tuple[int, int, int]]],
    about: dict[tuple[int, int], tuple[int, int]],
    boxes: dict[int, tuple[int, int, int]],
    names: dict[int, str],
    loads: dict[int, list[int]],
) -> list[tuple[tuple[int, int], int, int, int]]:
    """(what, start, stop, the rank that writes it) for every span that the same ranks hold.

    What one rank alone holds is its own; the rest goes, the largest first, to the holder that has least so far.
    """
    spans: list[tuple[int, tuple[int, int], int, int, list[int]]] = []
    for what, found in holders.items():
        cuts = sorted({edge for start, stop, _ in found for edge in (start, stop)})
        key, numel, _ = boxes[what[1]]
        missing = cuts[0] != 0 or cuts[-1] != numel
        for start, stop in zip(cuts, cuts[1:], strict=False):
            who = sorted(rank for first, last, rank in found if first <= start and stop <= last)
            missing |= not who
            spans.append(((stop - start) * about[what][1], what, start, stop, who))
        if missing:
            raise RuntimeError(f"no rank holds some of the optimizer's state of {names.get(key, 'a tensor')}")
    spans.sort(key=lambda span: (len(span[4]) > 1, -span[0], span[1:4]))
    owners = []
    for size, what, start, stop, who in spans:
        load = loads[about[what][0]]
        owner = min(who, key=lambda rank: (load[rank], rank))
        load[owner] += size
        owners.append((what, start, stop, owner))
    return sorted(owners)


def _check_boxes(boxes: dict[int, tuple[int, int, int]], names: dict[int, str]) -> None:
    covered: dict[int, int] = defaultdict(int)
    for key, numel, _ in boxes.values():
        covered[key] += numel
    for key, _, total in boxes.values():
        if covered[key] != total:
            name = names.get(key, "a tensor of another rank")
            raise RuntimeError(f"the ranks' boxes of {name} have {covered[key]} elements, the tensor {total}")
