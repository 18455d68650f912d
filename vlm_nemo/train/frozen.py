"""Parts that do not learn are written once; later checkpoints of the run hold the same files under a second name.

checkpoints/.frozen holds a name of each such file for as long as the run lasts, whatever becomes of the checkpoints
that it came from. Where the file system knows no hard links nothing is shared, and every checkpoint is written whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from vlm_nemo.runtime import groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.train import manifest, tensors
from vlm_nemo.train.manifest import Damaged, File
from vlm_nemo.train.shares import WEIGHT, Held, identity

FOLDER = ".frozen"


class Frozen:
    """Which files hold the frozen parts. All ranks make one together; rank 0 does what touches files."""

    def __init__(self, folder: Path, ranks: Ranks, parts: Collection[str]) -> None:
        self.parts = frozenset(parts)
        self.stored: frozenset[str] = frozenset()
        """Those that need not be written any more."""
        self._folder, self._main = folder, ranks.main
        self._files: dict[str, File] = {}
        linkable = True
        if ranks.main:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            linkable = manifest.can_link(folder)
        self._linkable = groups.max_over([not linkable])[0] == 0

    def covers(self, name: str) -> bool:
        """Whether a file of a checkpoint, by its name, holds only what does not change."""
        kind, _, file = name.partition("/")
        return kind == "weights" and (file == tensors.UNUSED_FILE or file.rpartition("_")[0] in self.parts)

    def holds(self, name: str) -> bool:
        """Rank 0: whether a file is stored."""
        return name in self._files

    def take_over(self, source: Path, mine: Sequence[Held], fresh: Collection[str], keys: Collection[int]) -> None:
        """Share the files of the checkpoint that the weights were loaded from, part by part, where they hold that part,
        to the bit, and nothing else. Collective.

        mine: what this rank holds; fresh: parts that were not loaded; keys: identities of the whole model's tensors.
        """
        wanted = sorted(self.parts - set(fresh)) if self._linkable else []
        if not wanted:
            return
        reader = tensors.Reader(source / "weights")
        files = reader.files_of_parts()
        lacking: list[float] = []
        for part in wanted:
            weights = [piece for piece in mine if piece.what == WEIGHT and piece.part == part]
            same = all(reader.holds(WEIGHT, piece.box, piece.tensors[WEIGHT].dtype) for piece in weights)
            stored = [key for key in reader.shapes(WEIGHT) if key.split(".", 1)[0] == part]
            there = part in files and same and all(identity(key) in keys for key in stored)
            if there and self._main:
                there = self._keep_all(source, [f"weights/{name}" for name in files[part]])
            lacking.append(not there)
        agreed = groups.max_over(lacking)
        self.stored = frozenset(part for part, bad in zip(wanted, agreed, strict=True) if not bad)
        if self._main:
            for part in set(wanted) - self.stored:
                for name in files.get(part, ()):
                    self._files.pop(f"weights/{name}", None)

    def all_stored(self) -> None:
        """A checkpoint was written, so all files are there. On every rank."""
        if self._linkable:
            self.stored = self.parts

    def keep(self, final: Path, written: Sequence[File]) -> None:
        """Rank 0: hold on to those files of a new checkpoint that do not change any more."""
        if self._linkable:
            for entry in written:
                if self.covers(entry.file):
                    self._keep(final, entry)

    def link_into(self, draft: Path) -> list[File]:
        """Rank 0: what is stored, as part of a new checkpoint."""
        for entry in self._files.values():
            manifest.share(self._folder / FOLDER / entry.file, draft / entry.file, entry)
        return list(self._files.values())

    def close(self) -> None:
        """The checkpoints have the files; the second names are not needed any more."""
        if self._main:
            shutil.rmtree(self._folder / FOLDER, ignore_errors=True)

    def _keep_all(self, source: Path, names: Sequence[str]) -> bool:
        try:
            known = manifest.read_manifest(source).files
            for name in names:
                self._keep(source, known[name])
        except (OSError, KeyError, Damaged):  # another file system, somebody else's file, no list of hashes
            return False
        return True

    def _keep(self, step_folder: Path, entry: File) -> None:
        target = self._folder / FOLDER / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(step_folder / entry.file, target)
        self._files[entry.file] = entry
