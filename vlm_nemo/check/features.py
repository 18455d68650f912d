"""How large data.vision_cache gets, and whether its disk has room, before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.features import rows_of_grids
from vlm_nemo.data.layout.images import plan_sizes
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.mixture import drawn
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.folders import Folder, open_folder
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.runtime import device
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.vision_cache import check_cache
from vlm_nemo.types import UserError

LOOKED_AT = 20_000
"""Records of a source whose images' sizes are looked at; of a larger source, so many spread over it."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What the cache will hold."""

    image_bytes: float
    """The mean."""
    images: int | None
    """None where there is no data to count."""
    free: int
    """Bytes free on its disk."""
    limit: float
    """data.vision_cache_gb in bytes."""

    @property
    def total(self) -> float:
        return self.image_bytes * (self.images or 0)

    @property
    def fits(self) -> bool:
        return min(self.total, self.limit) <= self.free

    def said(self, folder: str) -> str:
        """In a line; of what does not fit, what to change."""
        line = f"data.vision_cache={folder} takes {self.image_bytes / 1e3:,.1f} kB an image"
        if self.images is not None:
            line += f", {self.total / 1e9:,.2f} GB for {self.images:,} images (less where some are the same)"
        line += f"; {self.free / 1e9:,.0f} GB are free there"
        if not self.fits:
            return f"{line}: free more, name another disk, or lower data.vision_cache_gb={self.limit / 1e9:g}"
        if self.total > self.limit:
            share = self.limit / self.total
            line += f"; data.vision_cache_gb={self.limit / 1e9:g} keeps {share:.0%} of it, the tower computes the rest"
        return line


def cache_size(data: DataConfig, model: ModelConfig, optim: OptimConfig, precision: str, *, there: bool) -> CacheSize:
    """there: whether the sources are. Raises UserError where the cache cannot be used at all."""
    check_cache(data, optim)
    assert data.vision_cache is not None
    spec = spec_of(model)
    row = model.vision.hidden_size * device.PRECISIONS[precision].itemsize
    folder = Path(data.vision_cache).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free, limit = shutil.disk_usage(folder).free, data.vision_cache_gb * 1e9
    if limit <= 0:
        raise UserError(f"data.vision_cache_gb={data.vision_cache_gb:g} must be above 0")
    if not there:
        one = _rows(spec, [(model.vision.image_size, model.vision.image_size)])[0] * row
        return CacheSize(image_bytes=one, images=None, free=free, limit=limit)
    cache, rows, images = Cache(data.store), 0.0, 0.0
    for name in drawn(data.sources):
        source = open_folder(data.sources[name].path, f"data.sources.{name}.path", cache=cache)
        counted = [_rows(spec, sizes) for sizes in _sizes(source)]
        scale = len(source) / max(1, len(counted))
        rows += scale * sum(sum(one) for one in counted)
        images += scale * sum(len(one) for one in counted)
    return CacheSize(image_bytes=row * rows / max(1.0, images), images=round(images), free=free, limit=limit)


def _sizes(source: Folder) -> Iterator[list[tuple[int, int]]]:
    step = max(1, len(source) // LOOKED_AT)
    return (source.sizes(number) for number in range(0, len(source), step))


def _rows(spec: ImageSpec, sizes: Sequence[tuple[int, int]]) -> list[int]:
    return [rows_of_grids(plan.grids, spec) for plan in plan_sizes(spec, sizes)]
