"""Change one thing of a packed row and look at what moves: the part of leaks that runs the model, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm_nemo.check.made import Subject, row_length
from vlm_nemo.check.trial import open_gates
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.views import vision_batch, window_patches
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import IGNORE_INDEX, Images, PackedBatch

SAME = 1e-6
"""Logits (features, losses) that moved by less, relative to the largest of them, did not move."""
ALIKE = 1e-4
"""The same sum in another order of additions."""
ROW = (0, 1, 4, 5)
"""Which of the subject's samples share the row: several images, none, one, two."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing that was tried."""

    what: str
    wanted: str
    seen: str
    ok: bool


def probe(subject: Subject) -> list[Probe]:
    """Everything that needs the model."""
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        (model,) = build_model(subject.model, ParallelConfig(), "fp32", seed=0)
        open_gates([model])
        model.eval()
        found = list(_Probes(subject, model).all())
        groups.stop()
    return found


class _Probes:
    """A model and a row of samples. Tokens lie in [first, end) of every sample."""

    def __init__(self, subject: Subject, model: VLM) -> None:
        self.subject, self.model = subject, model
        self.tokenizer = Tokenizer(subject.tokenizer)
        samples = subject.samples()
        self.samples = [samples[i] for i in ROW]
        self.capacity = row_length(samples)
        while self.capacity <= sum(len(sample.tokens) for sample in self.samples):
            self.capacity += row_length(samples)
        self.row = self.packed(self.samples)
        edges = self.row.cu_seqlens.tolist()
        self.spans = list(zip(edges, edges[1:], strict=False))[: len(self.samples)]
        self.logits = self.run(self.row)
        self.scale = float(self.logits.abs().max())

    def all(self) -> Iterator[Probe]:
        yield self.finite()
        yield from self.texts()
        yield from self.pictures()
        yield self.reversed()
        yield self.positions()
        yield self.losses()
        yield from tower_probes(self.model, self.row.images, self.subject.model.vision)

    def packed(self, samples: Sequence[EncodedSample]) -> PackedBatch:
        return pack_batch(samples, self.capacity, self.tokenizer.pad_id, self.subject.model.vision.patch_size)

    def run(self, row: PackedBatch) -> Tensor:
        """[T, V]"""
        batch = model_batch(row, self.subject.model, image_token=self.tokenizer.image_id, device=device.device())
        return self.model(batch, gather_logits=True)[0]

    def moved(self, row: PackedBatch) -> Tensor:
        """[T]: how far the logits of every token are from where they were, relative to the largest."""
        return (self.run(row) - self.logits).abs().amax(-1) / self.scale

    def finite(self) -> Probe:
        ok = bool(self.logits.isfinite().all()) and self.scale > 0
        return Probe(what="logits of the row", wanted="finite", seen="finite" if ok else "not", ok=ok)

    def texts(self) -> Iterator[Probe]:
        """Other words in the second half of each sample."""
        worst = before = 0.0
        behind = True
        for span in self.spans:
            row, first = self.reworded(span)
            moved = self.moved(row)
            worst = max(worst, _outside(moved, span))
            before = max(before, _largest(moved[span[0] : first]))
            behind &= _largest(moved[first : span[1]]) > SAME
        yield _unmoved("other words in a sample -> logits of other samples", worst)
        yield _unmoved("other words -> logits before them", before)
        yield _moved("other words -> logits behind them", behind)

    def reworded(self, span: tuple[int, int]) -> tuple[PackedBatch, int]:
        """The row with other words from the middle of a sample on; and the first of them."""
        tokens = self.row.tokens.clone()
        special = self.tokenizer.special_ids
        words = [t for t in range((span[0] + span[1]) // 2, span[1]) if int(tokens[t]) not in special]
        low = max(special) + 1
        tokens[words] = low + (tokens[words] - low + 7) % (self.tokenizer.vocab_size - low)
        return replace(self.row, tokens=tokens), words[0]

    def pictures(self) -> Iterator[Probe]:
        """Every image's colours turned around, one image after the other."""
        worst = before = 0.0
        behind = True
        for image, first in enumerate(first_slots(self.row.images)):
            span = next(span for span in self.spans if span[0] <= first < span[1])
            moved = self.moved(replace(self.row, images=turned(self.row.images, image)))
            worst = max(worst, _outside(moved, span))
            before = max(before, _largest(moved[span[0] : first]))
            behind &= _largest(moved[first : span[1]]) > SAME
        yield _unmoved("another image -> logits of other samples", worst)
        if not self.model.looks:  # in front of a sample's images all of them are looked at, as Llama 3.2 Vision does it
            yield _unmoved("another image -> logits before it", before)
        yield _moved("another image -> logits of its sample behind it", behind)

    def reversed(self) -> Probe:
        """The samples in the other order."""
        logits = self.run(self.packed(self.samples[::-1]))
        off, start = 0.0, 0
        for span in self.spans[::-1]:
            length = span[1] - span[0]
            off = max(off, _largest((logits[start : start + length] - self.logits[slice(*span)]).abs() / self.scale))
            start += length
        return _unmoved("samples in the other order -> logits", off, ALIKE)

    def positions(self) -> Probe:
        """Every sample's positions are those that it has alone."""
        bad = [
            number
            for number, (sample, span) in enumerate(zip(self.samples, self.spans, strict=True))
            if not torch.equal(self.row.positions[:, slice(*span)], _own_positions(sample))
        ]
        seen = f"those of sample {bad[0] + 1} run on or are others" if bad else "so"
        return Probe(what="positions in a row", wanted="each sample's own, from 0", seen=seen, ok=not bad)

    def losses(self) -> Probe:
        """The model's loss of a token is that of its label, which nobody shifts once more."""
        row = self.row
        batch = model_batch(row, self.subject.model, image_token=self.tokenizer.image_id, device=device.device())
        supervised = (row.labels != IGNORE_INDEX).nonzero().flatten()
        losses = self.model(batch)
        expected = -self.logits[supervised].log_softmax(-1)[range(len(supervised)), row.labels[supervised]]
        off = _largest((losses - expected).abs()) / max(float(expected.max()), 1e-12)
        return Probe(
            what="loss of a token", wanted="minus the log-probability of its label", seen=_by(off), ok=off <= ALIKE
        )


def tower_probes(model: VLM, images: Images[Tensor], cfg: VisionConfig) -> Iterator[Probe]:
    """What a patch sees: those behind it too, and none of another view."""
    grids = [(int(h), int(w)) for h, w in images.grids.tolist()]
    rows, columns = grids[0]
    side = window_patches(cfg)
    if side is not None:
        rows, columns = min(rows, side), min(columns, side)
    last = (rows - 1) * grids[0][1] + columns - 1
    other = images.patches.clone()
    other[last] = 255 - other[last]
    given = (images.grids, cfg, images.tilings)
    before, after = (model.vision(vision_batch(p, *given)) for p in (images.patches, other))
    moved = (after - before).abs().amax(-1) / float(before.abs().max())
    kept = int(cfg.class_token and cfg.keep_class_token)
    first, end = kept, kept + grids[0][0] * grids[0][1]
    others = "views"
    if cfg.tiles is not None:  # the tiles of an image see one another, those that only fill it up too
        end, others = cfg.tiles * end, "images"
    if last > 0:
        sees = float(moved[first]) > SAME
        yield _moved("the last patch of a view -> the feature of its first", sees)
    if len(grids) > 1:
        outside = _largest(moved[end:])
        yield Probe(
            what=f"a patch -> features of other {others}", wanted="unmoved", seen=_by(outside), ok=outside <= SAME
        )


def first_slots(images: Images[Tensor]) -> list[int]:
    """The first token of the row at which each image stands."""
    if not len(images.sources):  # the decoder looks at the images
        return images.slots.tolist()
    found, start = [], 0
    sources = images.sources if images.shares is None else images.sources[:, 0]
    for count in images.embeddings.tolist():
        mine = (sources >= start) & (sources < start + count)
        found.append(int(images.slots[mine].min()))
        start += count
    return found


def turned(images: Images[Tensor], image: int) -> Images[Tensor]:
    """The same with one image's colours turned around."""
    views = images.views.tolist()
    sizes = images.grids.prod(1).tolist()
    first = sum(sizes[: sum(views[:image])])
    end = sum(sizes[: sum(views[: image + 1])])
    patches = images.patches.clone()
    patches[first:end] = 255 - patches[first:end]
    return replace(images, patches=patches)


def _unmoved(what: str, by: float, bound: float = SAME) -> Probe:
    return Probe(what=what, wanted="unmoved", seen=_by(by), ok=by <= bound)


def _moved(what: str, did: bool) -> Probe:
    return Probe(what=what, wanted="moved", seen="moved" if did else "unmoved", ok=did)


def _own_positions(sample: EncodedSample) -> Tensor:
    if sample.positions is not None:
        return torch.from_numpy(sample.positions)
    return torch.arange(len(sample.tokens)).expand(3, -1)


def _outside(moved: Tensor, span: tuple[int, int]) -> float:
    return max(_largest(moved[: span[0]]), _largest(moved[span[1] :]))


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _by(value: float) -> str:
    return "unmoved" if value == 0 else f"by {value:.0e}"
