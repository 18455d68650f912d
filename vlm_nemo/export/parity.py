"""Does an exported model say what the model said? A report with figures and limits, which can fail the export.

The graphs run in ONNX Runtime on the CPU beside the fp32 model, on random prompts of uneven length with none, one
and two images, whose next tokens are given (teacher-forced), so that one wrong step cannot hide behind another:

    vision      image embeddings
    stepwise    each prompt alone, then a token at a time
    ragged      all prompts in one batch, padded on the right, then a token of each at a time, at uneven positions
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from vlm_nemo.export.gate import GateError
from vlm_nemo.export.reference import Reference
from vlm_nemo.infer.bundle import Bundle
from vlm_nemo.infer.static_cache import StaticCacheBackend
from vlm_nemo.types import UserError

LIMITS = {"fp32": (1e-4, 0.0), "fp16": (0.0, 3e-3)}
"""Largest error: absolute, and as a share of the largest value (fp16 has 11 bits; 1e-3 of it was measured)."""
STEPS = 8
"""Tokens decoded behind each prompt."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One part of the report."""

    max_error: float
    limit: float
    worst_step: int
    """0 = the prompt, n = the n-th token behind it"""
    steps: int
    argmax_equal: float | None = None
    """Share of the logits whose likeliest token is the model's."""

    @property
    def ok(self) -> bool:
        return self.max_error <= self.limit


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt, the tokens that follow it, and what the model says behind the prompt and behind each of them."""

    tokens: NDArray[np.int64]
    prompt: int
    """Tokens of the prompt."""
    images: NDArray[np.uint8]
    logits: NDArray[np.float32]
    """[steps + 1, V]"""


def make_cases(reference: Reference, bundle: Bundle, tokens: int, max_positions: int) -> list[Case]:
    """Prompts of uneven length with 0, 1 and 2 images (fewer where they do not fit), and the model's logits.

    tokens: ids below this are drawn. Raises UserError if not even a few tokens fit.
    """
    rng = np.random.default_rng(20)
    room = min(bundle.capacity, max_positions)
    steps = min(STEPS, room // 4)
    if steps < 1:
        raise UserError(f"export.capacity={bundle.capacity} leaves no room for a prompt and an answer; raise it")
    size, per = bundle.image.size, bundle.image_tokens
    cases = []
    for images, text in ((0, 5), (1, 9), (2, 7)):
        while images and images * per + text + steps > room:
            images -= 1
        length = images * per + min(text, room - steps - images * per)
        ids = rng.integers(0, tokens, length + steps)
        ids[ids == bundle.image_token] = (bundle.image_token + 1) % tokens
        for i in range(images):
            ids[1 + i * (per + 1) :][:per] = bundle.image_token
        pixels = rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8)
        logits = reference.logits(ids, pixels)[length - 1 :]
        cases.append(Case(tokens=ids, prompt=length, images=pixels, logits=logits))
    return cases


def measure(
    backend: StaticCacheBackend, reference: Reference, cases: list[Case], precision: str
) -> dict[str, Measured]:
    """Run the graphs as the report says. backend: at least as many slots as cases."""
    pixels = np.concatenate([case.images for case in cases])
    found = {}
    if len(pixels):
        expected = reference.image_embeds(pixels)
        found["vision"] = _compare(precision, [(0, backend.embed_images(pixels).astype(np.float32), expected)])
    found["stepwise"] = _compare(precision, list(_stepwise(backend, cases)), argmax=True)
    found["ragged"] = _compare(precision, list(_ragged(backend, cases)), argmax=True)
    return found


Step = tuple[int, NDArray[np.float32], NDArray[np.float32]]
"""Its number, what the graph said, what the model said."""


def _stepwise(backend: StaticCacheBackend, cases: list[Case]) -> Iterator[Step]:
    for slot, case in enumerate(cases):
        embeds = backend.embed(case.tokens[: case.prompt].tolist(), case.images)
        for step, expected in enumerate(case.logits):
            start = 0 if step == 0 else case.prompt + step - 1
            if step:
                embeds = backend.embed([int(case.tokens[start])], None)
            positions = start + np.arange(len(embeds), dtype=np.int64)
            last = np.array([len(embeds) - 1], dtype=np.int64)
            got = backend.step(slot, embeds[None], positions[None], positions[:1], last)
            yield step, got[0], expected


def _ragged(backend: StaticCacheBackend, cases: list[Case]) -> Iterator[Step]:
    lengths = np.array([case.prompt for case in cases], dtype=np.int64)
    batch = np.zeros((len(cases), lengths.max(), backend.bundle.hidden_size), dtype=backend.bundle.storage)
    for row, case in zip(batch, cases, strict=True):
        row[: case.prompt] = backend.embed(case.tokens[: case.prompt].tolist(), case.images)
    positions = np.tile(np.arange(lengths.max(), dtype=np.int64), (len(cases), 1))
    got = backend.step(0, batch, positions, np.zeros_like(lengths), lengths - 1)
    yield 0, got, np.stack([case.logits[0] for case in cases])
    for step in range(1, len(cases[0].logits)):
        where = lengths + step - 1
        embeds = [backend.embed([int(c.tokens[at])], None) for c, at in zip(cases, where, strict=True)]
        got = backend.step(0, np.stack(embeds), where[:, None], where, np.zeros_like(where))
        yield step, got, np.stack([case.logits[step] for case in cases])


def _compare(precision: str, steps: list[Step], *, argmax: bool = False) -> Measured:
    errors = [(float(np.abs(got - expected).max()), step) for step, got, expected in steps]
    # A NaN is the largest error of all, and max() would pass over it
    worst = max(((float("inf") if np.isnan(error) else error, step) for error, step in errors))
    absolute, share = LIMITS[precision]
    largest = max(float(np.abs(expected).max()) for _, _, expected in steps)
    same = np.concatenate([np.atleast_1d(got.argmax(-1) == expected.argmax(-1)) for _, got, expected in steps])
    return Measured(
        max_error=worst[0],
        limit=max(absolute, share * max(1.0, largest)),
        worst_step=worst[1],
        steps=1 + max(step for _, step in errors),
        argmax_equal=float(same.mean()) if argmax else None,
    )


def report(found: dict[str, Measured], *, precision: str, ran: str, versions: dict[str, str]) -> dict[str, Any]:
    """What parity.json holds. ran: the precision of the graphs that were run, fp32 where bf16 has no CPU kernels."""
    note = f"the {precision} graphs themselves were run"
    if ran != precision:
        note = (
            f"ONNX Runtime has no {precision} kernels on a CPU: a twin in {ran} was run, whose graphs are the same "
            f"node by node, types aside; the {precision} graphs themselves were checked and not run"
        )
    return {
        "ok": all(part.ok for part in found.values()),
        "precision": precision,
        "ran": ran,
        "note": note,
        "runtime": f"onnxruntime {versions['onnxruntime']}, CPU",
        "against": f"vlm_nemo's own model in fp32, torch {versions['torch']}",
        "parts": {name: {**asdict(part), "ok": part.ok} for name, part in found.items()},
    }


def first_failure(found: dict[str, Measured]) -> str | None:
    """The line about the first part that is over its limit: which step, how far, and the limit."""
    for name, part in found.items():
        if not part.ok:
            return (
                f"parity failed: {name}, step {part.worst_step}: the export is off by {part.max_error:.3g}, "
                f"the limit is {part.limit:.3g}"
            )
    return None


def check_twins(graph: Path, twin: Path) -> None:
    """Raises GateError if two graphs differ in more than their types."""
    a, b = (_skeleton(onnx.load(path, load_external_data=False).graph) for path in (graph, twin))
    if a != b:
        raise GateError(f"{graph} and its twin {twin} are not the same graph")


def _skeleton(graph: onnx.GraphProto) -> list[Any]:
    """Nodes without what a precision changes: the targets of casts and the numbers' types in names."""

    def plain(name: str) -> str:
        return name.rpartition("_")[0] if name.startswith("number_") else name

    return [
        (
            node.op_type,
            [plain(name) for name in node.input],
            list(node.output),
            [a.SerializeToString() for a in node.attribute if node.op_type != "Cast"],
        )
        for node in graph.node
    ]
