"""Which layers of the decoder each pipeline stage has, so that none waits for another. Pure: numbers only.

The first stage has the vision tower, the projector and the embedding too, the last one the head and the loss. What
each of these costs is counted in FLOPs, forward and backward, over typical rows (`flops.py`); the cut is the one whose
dearest stage is cheapest, and of several such cuts the most even one:

    vision 6, eight layers of 2, head 4, three stages      6 + 1 x 2 | 4 x 2 | 3 x 2 + 4  ->  [1, 4, 3]: 8 | 8 | 10

A stage of several virtual chunks works all of them in turn, so there it is the sum over them that counts.

Where the tower's features are kept (data.vision_cache) the cut is the one for a tower that runs, as in the first epoch
of a new cache: whether and when a run finds all its images there is not known when it is cut. What a full cache makes
of that cut, and which one would suit it, is told beside it (`once_kept`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.batch import looked
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.flops import Grid, layer_flops, step_flops
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.share import embedders
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import PackedBatch

WORTH = 0.01
"""By how much the busiest stage must become lighter for another cut to be worth a word."""
TIE = 1e-9
"""Cuts whose dearest stages differ by less, relatively, are as good as one another."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Rows by which stages are balanced."""

    lengths: tuple[int, ...]
    """Tokens of every sample, image tokens included."""
    grids: tuple[tuple[Grid, ...], ...]
    """Of every view, row by row."""
    supervised: int
    """Labels that take part in the loss."""
    views: tuple[int, ...] | None = None
    """Of every image; None = one each."""
    looked: tuple[tuple[int, int], ...] = ()
    """So many tokens look at so many features, in the layers of the decoder that look at images."""
    kept: bool = False
    """What the tower makes of images is kept (data.vision_cache)."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs of forward and backward over the Work, of all tensor and context ranks together."""

    first: float
    """Vision tower and projector. Looking up embeddings is no arithmetic."""
    layers: tuple[float, ...]
    """Every layer of the decoder: local and global attention differ."""
    last: float
    """The head."""


def costs_of(
    cfg: ModelConfig, parallel: ParallelConfig, trained: Mapping[str, bool], work: Work, *, read: bool = False
) -> Costs:
    """trained: part -> whether it learns: a frozen tower has no backward pass, a frozen decoder makes no gradients of
    its weights. read: what the tower made of all images was kept, and is read.

    Where ranks share out images, the one with most decides how long vision takes (`share.embedders`).
    """
    grids = [grid for row in work.grids for grid in row]
    all_parts = step_flops(
        cfg,
        trained,
        lengths=work.lengths,
        grids=[] if read else grids,
        known=grids if read else [],
        supervised=work.supervised,
        views=[] if read else work.views,
        looked=work.looked,
    )
    features = sum(view_tokens(spec_of(cfg), grid) for grid in grids) if work.looked else 0
    first = all_parts.vision + all_parts.projector
    first *= embedders(parallel, kept=work.kept).times(cfg, work.grids, work.views)
    layers = range(cfg.language.num_layers)
    return Costs(
        first=first,
        layers=tuple(layer_flops(cfg.language, n, trained, work.lengths, work.looked, features) for n in layers),
        last=all_parts.head,
    )


def work_of(rows: Sequence[PackedBatch], cfg: ModelConfig, *, kept: bool = False) -> Work:
    """Of packed rows, whatever is in their images. kept: see `Work`."""
    return Work(
        lengths=tuple(length for row in rows for length in row.lengths),
        grids=tuple(tuple((int(h), int(w)) for h, w in row.images.grids.tolist()) for row in rows),
        supervised=sum(row.supervised for row in rows),
        views=tuple(count for row in rows for count in row.images.views.tolist()),
        looked=tuple(look for row in rows for look in looked(row, cfg)),
        kept=kept,
    )


def resolved(cfg: ModelConfig, parallel: ParallelConfig, trained: Mapping[str, bool], work: Work) -> ParallelConfig:
    """The layout with the layers of every chunk filled in, where none are given."""
    if parallel.pipeline == 1 or parallel.layers:
        return parallel
    return replace(parallel, layers=balanced(costs_of(cfg, parallel, trained, work), parallel))


def chunk_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of every chunk in order: what `parallel.layers` says, else as even as can be."""
    if parallel.layers:
        return list(parallel.layers)
    return balanced(Costs(first=0.0, layers=(1.0,) * num_layers, last=0.0), parallel)


def balanced(costs: Costs, parallel: ParallelConfig) -> list[int]:
    """Layers of every chunk in order so that the dearest stage is as cheap as can be: at least one each, but that the
    first stage may have none beside its images.

    Exact. With virtual chunks a layer counts as the mean of all: theirs lie scattered over the decoder.
    """
    if parallel.virtual == 1:
        return _cut(costs, parallel.pipeline)
    mean = sum(costs.layers) / len(costs.layers)
    extras = [0.0] * parallel.pipeline
    extras[0] += costs.first
    extras[-1] += costs.last
    counts = _spread(len(costs.layers), extras, mean, least=parallel.virtual)
    inside = []
    for stage, count in enumerate(counts):
        own = [0.0] * parallel.virtual
        own[0] += costs.first if stage == 0 else 0.0
        own[-1] += costs.last if stage == parallel.pipeline - 1 else 0.0
        inside.append(_spread(count, own, mean, least=1))
    return [inside[stage][chunk] for chunk in range(parallel.virtual) for stage in range(parallel.pipeline)]


def stage_costs(costs: Costs, layers: Sequence[int], pipeline: int) -> list[float]:
    """Of every stage, for layers a chunk as in `parallel.layers`."""
    found, start = [0.0] * pipeline, 0
    for chunk, count in enumerate(layers):
        found[chunk % pipeline] += sum(costs.layers[start : start + count])
        start += count
    found[0] += costs.first
    found[-1] += costs.last
    return found


def busiest(stages: Sequence[float]) -> float:
    """The dearest stage over the mean; 1 = all equal."""
    return max(stages) * len(stages) / sum(stages)


def as_words(layers: Sequence[int]) -> str:
    """As on the command line: parallel.layers=[7,9,9,9]"""
    return f"parallel.layers={list(layers)}".replace(" ", "")


def described(costs: Costs, layers: Sequence[int], pipeline: int) -> str:
    """In a line: [7, 9, 9, 9] layers a stage …"""
    stages = stage_costs(costs, layers, pipeline)
    total = sum(stages)
    shares = " ".join(f"{stage / total:.1%}" for stage in stages)
    return (
        f"{as_words(layers)}: stages do {shares} of the arithmetic (vision {costs.first / total:.1%}, head "
        f"{costs.last / total:.1%}), the busiest {busiest(stages):.3f} x the mean"
    )


def once_kept(cfg: ModelConfig, parallel: ParallelConfig, trained: Mapping[str, bool], work: Work) -> list[str]:
    """With data.vision_cache, in a line, what its being full makes of a cut, and what would suit that better.
    parallel.layers is filled in."""
    if parallel.pipeline == 1 or not work.kept:
        return []
    costs = costs_of(cfg, parallel, trained, work, read=True)
    cuts = parallel.layers, balanced(costs, parallel)
    now, best = (busiest(stage_costs(costs, layers, parallel.pipeline)) for layers in cuts)
    line = f"once data.vision_cache holds every image the tower rests and the busiest stage does {now:.3f} x the mean"
    if now > best * (1 + WORTH):
        line += f"; {as_words(cuts[1])} makes that {best:.3f} x"
    return [line]


def told_of_images(cfg: ModelConfig, parallel: ParallelConfig, work: Work) -> list[str]:
    """Who embeds a row's images, in a line, where ranks share them out or could."""
    could = embedders(parallel, kept=False)
    if not could.shared:
        return []
    if work.kept:
        return [f"with data.vision_cache each of {could.ranks} ranks embeds all images of a row"]
    busiest = could.times(cfg, work.grids, work.views)
    return [f"{could.ranks} ranks share out the images of a row, the busiest does {busiest:.2f} x the mean"]


def layout(layers: Sequence[int]) -> list[list[str]]:
    """megatron's `pipeline_model_parallel_layout`: [1, 2] -> [[embedding, decoder], [decoder, decoder, loss]]."""
    chunks = [["decoder"] * count for count in layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _cut(costs: Costs, stages: int) -> list[int]:
    """Successive layers for every stage: first the least that the dearest stage can cost, then, among the cuts that
    cost no more, the one with the least sum of squares; of equal ones that with fewer layers in front."""
    before = [0.0, *accumulate(costs.layers)]
    total = len(costs.layers)

    def cost(stage: int, start: int, end: int) -> float:
        ends = (costs.first if stage == 0 else 0.0) + (costs.last if stage == stages - 1 else 0.0)
        return before[end] - before[start] + ends

    def best(join: Callable[[float, float], float], limit: float) -> tuple[float, tuple[int, ...]]:
        """(value, layers of each stage), by stages one after the other: of the cuts that give out as many layers up to
        here, only the best can be part of the best whole."""
        reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for stage in range(stages):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for start, (value, counts) in reached.items():
                fewest = 0 if stage == 0 and stages > 1 else 1
                for end in range(start + fewest, total - (stages - stage - 1) + 1):
                    one = cost(stage, start, end)
                    if one > limit:
                        break
                    found = (join(value, one), (*counts, end - start))
                    if end not in after or _better(found, after[end]):
                        after[end] = found
            reached = after
        return reached[total]

    least, _ = best(max, math.inf)
    _, counts = best(lambda value, one: value + (one / least) ** 2, least * (1 + TIE))
    return list(counts)


def _better(one: tuple[float, tuple[int, ...]], other: tuple[float, tuple[int, ...]]) -> bool:
    off = one[0] - other[0]
    return off < 0 if abs(off) > TIE * other[0] else one[1] < other[1]


def _spread(count: int, loads: Sequence[float], each: float, least: int) -> list[int]:
    """So many equal pieces given out to loads, at least so many to each, the next one always to the lightest (of equal
    ones the last): for equal pieces that is exact.

    (4, [6, 0], 2, least=1) -> [1, 3]: 8 and 6
    """
    counts = [least] * len(loads)
    for _ in range(count - least * len(loads)):
        totals = [load + each * n for load, n in zip(loads, counts, strict=True)]
        lightest = min(totals)
        counts[max(i for i, total in enumerate(totals) if total <= lightest * (1 + TIE))] += 1
    return counts
