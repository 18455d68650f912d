"""Requests whose answers are not over yet, as the engine sees them. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.request import Prompt
from vlm_nemo.infer.sampling import Sampler, SamplingParams
from vlm_nemo.infer.text import TextStream
from vlm_nemo.types import Images, UserError


@dataclass(kw_only=True, eq=False, repr=False)
class PendingAnswer:
    """One answer while it is waiting or running."""

    request: PendingRequest
    index: int
    sampler: Sampler
    text: TextStream
    last: int = -1
    """What was chosen last; it is not in the cache yet."""
    said: int = 0
    """Tokens of the answer."""
    slot: int | None = None
    """None = waiting."""
    over: bool = False

    @property
    def cached(self) -> int:
        """Tokens in the cache, while it runs."""
        return len(self.request.prompt.tokens) + self.said - 1

    @property
    def row(self) -> Row:
        """What was chosen last, on its way into the cache."""
        assert self.slot is not None
        prompt, positions = self.request.prompt, None
        if prompt.positions is not None:
            positions = np.full((3, 1), prompt.positions.max() + self.said)
        return Row(slot=self.slot, start=self.cached, tokens=(self.last,), positions=positions)


@dataclass(kw_only=True, eq=False, repr=False)
class PendingRequest:
    """A request until its last answer is over."""

    number: int
    prompt: Prompt
    params: SamplingParams
    sequences: list[PendingAnswer] = field(default_factory=list)
    unfilled: int
    """Answers whose prompt has not been in the cache yet."""
    images: Images[NDArray[Any]] | None = None
    """Here from the first answer's turn to the last one's."""


def have_images(request: PendingRequest) -> str | None:
    """Decode the request's images, unless an earlier answer's turn did; why that cannot be, in one line."""
    if request.images is not None or not request.prompt.image_count:
        return None
    try:
        images = request.prompt.images()
    except (UserError, OSError) as error:
        return str(error)
    count = 0 if images is None else images.count
    if count != request.prompt.image_count:
        return f"{request.prompt.image_count} images were announced and {count} came"
    request.images = images
    return None


def prompt_row(s: PendingAnswer) -> Row:
    assert s.slot is not None
    prompt = s.request.prompt
    return Row(slot=s.slot, start=0, tokens=prompt.tokens, images=s.request.images, positions=prompt.positions)
