"""The words every floor shares: dimension letters, the packed batch, the ignored label, the user's error.

| letter | meaning                                   |
|--------|-------------------------------------------|
| T      | tokens of a packed row (constant)         |
| S      | segments (samples, then padding) of a row |
| V      | views (squares, or whole images) of a row |
| P      | patches of all views of a row             |
| E      | embeddings that the views give            |
| M      | placeholders of a row                     |
| D      | width of an embedding                     |

Letters name logical dimensions; sharding never renames them.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", bound=Sized)
"""NDArray where threads decode and where a server has no torch; Tensor in a PackedBatch."""

IGNORE_INDEX = -100
"""A label that takes no part in the loss (the value that PyTorch and Hugging Face use)."""

IMAGE_MARKER = "<image>"
"""Stands for one image in a message's text, as in LLaVA's files."""


class UserError(Exception):
    """Something the user can mend: a key, a file, a layout. Shown as one line on one rank; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Images(Generic[Array]):
    """The pictures of a row (or a sample, or a prompt), cut into patches, in the order of their placeholders.

    An image is one view or several (tiles, a thumbnail); a view is a grid of patches. The tower and the projector make
    E embeddings of all views, one view after the other; what stands at which placeholder is said by `sources`:

        slots    [2 3 4 5 6]      rows of the text: placeholders
        sources  [0 1 -1 2 3]     embedding 0, embedding 1, extra row 0 (LLaVA-NeXT's newline), embedding 2, 3

    Two images: the second one's sources go on behind the first one's embeddings.
    """

    patches: Array
    """[P, p*p*3] uint8: row by row in a view; inside a patch row by row, the colours of a pixel side by side"""
    grids: Array
    """[V, 2] int64: rows and columns of patches of every view"""
    views: Array
    """[N] int64: views of every image"""
    embeddings: Array
    """[N] int64: what the views of every image give; not all of them need have a place"""
    slots: Array
    """[M] int64, ascending: places in the row's (sample's, prompt's) tokens; for a decoder that looks at images by
    cross-attention [N], the places of the image tokens, and no sources"""
    sources: Array
    """[M] int64: >= 0 an embedding, -1 - k the projector's extra row k; [M, 4] where there are shares"""
    shares: Array | None = None
    """[M, 4] float32: how much of each of four sources stands there (LLaVA-OneVision scales many tiles down)"""
    tilings: Array | None = None
    """[N, 2] int64: rows and columns of tiles of every image, for a tower that tells arrangements apart (Llama 3.2)"""

    @property
    def count(self) -> int:
        """Images, N."""
        return len(self.views)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One packed row: several samples side by side, padded to T. All tensors live on the CPU.

    T=8, samples of 3 and 4 tokens, one token of padding:
        tokens     [a a a b b b b pad]
        positions  [0 1 2 0 1 2 3 0]      (three equal rows: t, y, x; they differ only under M-RoPE)
        cu_seqlens [0 3 7 8]              (padding is the last segment)
        labels     shifted: labels[t] is the token that the logits at t should predict, or IGNORE_INDEX
    """

    tokens: Tensor
    """[T] int64; an image is placeholders, with the special tokens of its layout around and between them."""
    labels: Tensor
    """[T] int64"""
    positions: Tensor
    """[3, T] int64"""
    cu_seqlens: Tensor
    """[S+1] int32, from 0 to T"""
    images: Images[Tensor]
    """What the vision tower gets, and where it goes."""
    samples: int
    """Samples in the row."""
    used_tokens: int
    """Tokens that are not padding."""
    features: Tensor | None = None
    """[N, D_vision]: what the tower makes of the row's images, where it is known (`data.vision_cache`): then there are
    no patches."""
    image_keys: tuple[bytes, ...] = ()
    """Hashes of the row's images under which their features are to be kept; on the rank that reads."""
    segment_labels: Tensor | None = None
    """[S] int64: what `supervised_by_segment` gives, for ranks that get no labels; None: they are counted"""

    def supervised_by_segment(self) -> Tensor:
        """[S] int64: labels of every segment that take part in the loss."""
        if self.segment_labels is not None:
            return self.segment_labels
        bounds = self.cu_seqlens.tolist()
        counts = [
            int((self.labels[start:end] != IGNORE_INDEX).sum()) for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        return self.cu_seqlens.new_tensor(counts).long()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, padding left out."""
        bounds = [c for c in self.cu_seqlens.tolist() if c <= self.used_tokens]
        return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]

    @property
    def supervised(self) -> int:
        """Number of labels that take part in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())
