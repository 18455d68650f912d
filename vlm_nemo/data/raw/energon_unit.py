"""WebDatasets that megatron-energon prepared, to be converted: the units of one split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlm_nemo.data.raw.energon import EnergonMeta, energon_sample, read_energon
from vlm_nemo.data.raw.tar import Group, count_tar, read_members, scan_tar
from vlm_nemo.data.raw.unit import Map, RawDrop, RawSample, attempt, digest, shard_image, stamp
from vlm_nemo.data.turns import check_images, check_turns
from vlm_nemo.types import UserError


@dataclass(frozen=True, kw_only=True)
class EnergonUnit:
    """Samples `first` to `first + count` of a tar, without those that the split leaves out."""

    folder: str
    tar: str
    """Relative to the folder."""
    first: int
    count: int
    meta: EnergonMeta
    """Of this tar only."""

    def fingerprint(self) -> str:
        meta = [self.meta.sample_type, self.meta.field_map, sorted(self.meta.excluded)]
        return digest("energon", self.tar, stamp(Path(self.folder) / self.tar), self.first, self.count, meta)

    def read(self) -> Iterator[RawSample | RawDrop]:
        tar = Path(self.folder) / self.tar
        groups = _left(scan_tar(tar), self.tar, self.meta.excluded)[self.first : self.first + self.count]
        for key, contents in read_members(tar, groups, self.meta.members):
            yield attempt(f"{self.tar}/{key}", partial(self._sample, contents=contents))

    def _sample(self, name: str, contents: dict[str, bytes]) -> RawSample:
        messages, images = energon_sample(self.meta, contents)
        check_images(messages, len(images))
        check_turns(messages)
        return RawSample(name, messages, None, [shard_image(image) for image in images])


def list_energon(where: dict[str, Path], options: dict[str, str], shard_samples: int, apply: Map) -> list[EnergonUnit]:
    """Units of a split. Raises UserError if the folder was not prepared, or a tar is not what energon counted."""
    folder = where["path"]
    meta = read_energon(folder, options.get("split", "train"))
    units = []
    counts = apply(count_tar, [folder / tar for tar in meta.tars])
    for tar, found in zip(meta.tars, counts, strict=True):
        if found != meta.counts[tar]:
            raise UserError(
                f"{folder / tar} holds {found} samples, energon counted {meta.counts[tar]}; fetch it again, or run "
                "`energon prepare` again"
            )
        excluded = frozenset(name for name in meta.excluded if name.startswith(f"{tar}/"))
        own = EnergonMeta(
            tars=(tar,),
            counts={tar: found},
            excluded=excluded,
            sample_type=meta.sample_type,
            field_map=meta.field_map,
        )
        samples = len(_left(scan_tar(folder / tar), tar, excluded)) if excluded else found
        for first in range(0, samples, shard_samples):
            count = min(shard_samples, samples - first)
            units.append(EnergonUnit(folder=str(folder), tar=tar, first=first, count=count, meta=own))
    return units


def _left(groups: list[Group], tar: str, excluded: frozenset[str]) -> list[Group]:
    return [group for group in groups if f"{tar}/{group[0]}" not in excluded] if excluded else groups
