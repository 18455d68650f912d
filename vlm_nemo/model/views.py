"""Views on their way into the vision tower: patches, and where each lies. Pure: plain tensors made on the CPU.

A view is a grid of patches; the views of a row follow one another, whatever their sizes:

    grids    (2, 3) (1, 2)         six patches and two
    patches  0 1 2 3 4 5 | 6 7     row by row in each view

The tower may keep them in another order (its rows): class tokens stand before their view's patches, and where there
are windows, the patches of a window stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.segments import Segments, make_segments
from vlm_nemo.model.tiles import TileRows, tile_rows
from vlm_nemo.types import UserError

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True, kw_only=True)
class VisionBatch:
    """What the tower takes: V views of P patches in all; N rows, class tokens among them."""

    patches: Tensor
    """[P, p*p*3] uint8, as in `vlm_nemo.types.Images`"""
    grids: tuple[Grid, ...]
    """Rows and columns of every view."""
    segments: Segments | TileRows
    """All patches of a view see one another; in layers with windows, those of a window do."""
    patch_rows: Tensor | None
    """[P] int64: the tower's row of every patch; None where they are the same"""
    class_rows: Tensor | None
    """[V] int64: the row of every class token; None without them"""
    out_rows: Tensor | None
    """[N'] int64: which row each of the features given back is in; None where they are the same"""
    places: Tensor | None
    """[N, 2] float32: row and column of every row's patch, where positions are rotary; a class token's are 0"""
    stretch: dict[Grid, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Learned positions are made for one grid; another grid's are A P B^T with these A [rows, g] and B [columns, g]."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> VisionBatch:
        """The same, every tensor through `move`."""

        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else move(x)

        return VisionBatch(
            patches=move(self.patches),
            grids=self.grids,
            segments=self.segments.moved(move),
            patch_rows=optional(self.patch_rows),
            class_rows=optional(self.class_rows),
            out_rows=optional(self.out_rows),
            places=optional(self.places),
            stretch={grid: (move(a), move(b)) for grid, (a, b) in self.stretch.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the tower makes of a row's views, where it is known already."""

    rows: Tensor
    """[N, D], as `VisionTower.forward` gives it"""
    grids: tuple[Grid, ...]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Features:
        """The same, every tensor through `move`."""
        return Features(rows=move(self.rows), grids=self.grids)


def grids_of(grids: Tensor | Sequence[Grid]) -> tuple[Grid, ...]:
    """[V, 2] to tuples."""
    return tuple((int(h), int(w)) for h, w in (grids.tolist() if isinstance(grids, Tensor) else grids))


def vision_batch(
    patches: Tensor, grids: Tensor | Sequence[Grid], cfg: VisionConfig, tilings: Tensor | None = None
) -> VisionBatch:
    """Lay out the views of a row for the tower. patches: [P, p*p*3] uint8; grids: [V, 2]; at least one view.

    tilings: [N, 2] rows and columns of tiles of every image, for a tower with tiles.
    Raises ValueError where the grids are not of as many patches as there are, or the tiles not of as many views.
    """
    known = grids_of(grids)
    sizes = [h * w for h, w in known]
    if not known or sum(sizes) != patches.shape[0]:
        raise ValueError(f"{patches.shape[0]} patches, but grids {list(known)} are of {sum(sizes)}")
    if cfg.tiles is not None:
        return _tiled(patches, known, cfg, tilings)
    first = 1 if cfg.class_token else 0
    lengths = [first + n for n in sizes]
    starts = [sum(lengths[:i]) for i in range(len(known))]
    coordinates = [grid_places(grid) for grid in known]

    rows, windows = [], []
    for grid, start in zip(known, starts, strict=True):
        inside, counts = window_order(grid, window_patches(cfg))
        rows.append(start + first + inside)
        windows += counts
    patch_rows = torch.cat(rows)
    moved = cfg.class_token or cfg.window is not None

    class_rows = torch.tensor(starts) if cfg.class_token else None
    out_rows = patch_rows
    if class_rows is not None and cfg.keep_class_token:
        out_rows = torch.cat([x for pair in zip(class_rows[:, None], rows, strict=True) for x in pair])

    places = None
    if cfg.position == "rope":
        places = torch.zeros(sum(lengths), 2)
        places[patch_rows] = torch.cat(coordinates).float()
    base = cfg.image_size // cfg.patch_size
    others = {grid for grid in known if cfg.position == "learned" and grid != (base, base)}
    return VisionBatch(
        patches=patches,
        grids=known,
        segments=replace(_whole(lengths), windows=_whole(windows) if cfg.window is not None else None),
        patch_rows=patch_rows if moved else None,
        class_rows=class_rows,
        out_rows=out_rows if moved and not (cfg.keep_class_token and cfg.window is None) else None,
        places=places,
        stretch={grid: (bicubic(base, grid[0]), bicubic(base, grid[1])) for grid in sorted(others)},
    )


def _tiled(patches: Tensor, grids: tuple[Grid, ...], cfg: VisionConfig, tilings: Tensor | None) -> VisionBatch:
    """Of a tower with tiles; the views that it gives are all of an image's tiles, used or not."""
    assert cfg.tiles is not None and tilings is not None, "a tower with tiles wants to know their arrangement"
    views = int(tilings.prod(dim=1).sum())
    if len(grids) != views or len(set(grids)) > 1:
        raise ValueError(f"{len(grids)} views of grids {sorted(set(grids))}, but the images are of {views} equal tiles")
    grid = grids[0]
    return VisionBatch(
        patches=patches,
        grids=(grid,) * (len(tilings) * cfg.tiles),
        segments=tile_rows(tilings, cfg.tiles, 1 + grid[0] * grid[1]),
        patch_rows=None,
        class_rows=None,
        out_rows=None,
        places=None,
    )


def _whole(lengths: Sequence[int]) -> Segments:
    """Views or windows of these lengths, in each of which all see all."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return make_segments(cu, sum(lengths), causal=False)


def blank_view(cfg: VisionConfig, factor: int) -> tuple[Tensor, Tensor]:
    """Patches and grids of one small black view, for a row without images: the ranks beside it run the tower, and all
    must run the same collectives. factor: that of the reduction, which divides the grid."""
    patches = torch.zeros(factor * factor, 3 * cfg.patch_size**2, dtype=torch.uint8)
    return patches, torch.tensor([[factor, factor]])


def blank_batch(cfg: VisionConfig, factor: int) -> VisionBatch:
    """The blank view as the tower takes it; with tiles, an image of this one."""
    return vision_batch(*blank_view(cfg, factor), cfg, torch.tensor([[1, 1]]))


def grid_places(grid: Grid) -> Tensor:
    """[h*w, 2] int64: row and column of every patch. (1, 2) -> [[0, 0], [0, 1]]"""
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2)


def window_patches(cfg: VisionConfig) -> int | None:
    """Side of a window in patches. Raises UserError where the patch does not divide it, or there are class tokens."""
    if cfg.window is None:
        return None
    if cfg.window % cfg.patch_size:
        raise UserError(
            f"model.vision.window={cfg.window} is not a multiple of model.vision.patch_size={cfg.patch_size}"
        )
    if cfg.class_token:
        raise UserError(
            "model.vision.window and model.vision.class_token exclude one another: a class token is in "
            "no window; set one of them to null or false"
        )
    return cfg.window // cfg.patch_size


def window_order(grid: Grid, side: int | None) -> tuple[Tensor, list[int]]:
    """Where each patch of a view goes when those of a window stand together, and the length of every window.

    (2, 3) with windows of 2 x 2:  0 1 | 4  ->  ([0, 1, 4, 2, 3, 5], [4, 2])
                                   2 3 | 5
    """
    height, width = grid
    if side is None:
        return torch.arange(height * width), [height * width]
    place = grid_places(grid)
    window = (place[:, 0] // side) * -(-width // side) + place[:, 1] // side
    order = torch.sort(window, stable=True).indices
    return torch.argsort(order), torch.bincount(window).tolist()


def bicubic(old: int, new: int) -> Tensor:
    """[new, old] float32: stretching a row of `old` values to `new`, as torch's interpolate does it (mode bicubic,
    align_corners False), which the towers' own code calls. A product with it has a deterministic gradient."""
    a = -0.75
    source = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    left = source.floor()
    t = source - left
    near = [((a + 2) * x - (a + 3)) * x * x + 1 for x in (t, 1 - t)]
    far = [((a * x - 5 * a) * x + 8 * a) * x - 4 * a for x in (t + 1, 2 - t)]
    out = torch.zeros(new, old, dtype=torch.float64)
    for step, weight in zip((-1, 0, 1, 2), (far[0], near[0], near[1], far[1]), strict=True):
        index = (left.long() + step).clamp(0, old - 1)
        out.scatter_add_(1, index[:, None], weight[:, None])
    return out.float()


def runs(grids: Sequence[Grid]) -> list[tuple[Grid, int]]:
    """Views of equal grids that follow one another: ((2, 2), (2, 2), (1, 3)) -> [((2, 2), 2), ((1, 3), 1)]."""
    return [(grid, len(list(same))) for grid, same in groupby(grids)]


def patchify(images: Tensor, patch: int) -> Tensor:
    """[N, 3, H, W] -> [N (H/p)(W/p), p*p*3], the order of `vlm_nemo.types.Images`."""
    n, c, h, w = images.shape
    x = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, c * patch * patch)
