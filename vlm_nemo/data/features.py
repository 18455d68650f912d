"""What a frozen vision tower made of images, kept on disk: computed once, read back to the bit.

    DIR/3f…/                 all that one tower makes of images cut in one way
        tower.json           what it is, for people
        a1….features         the numbers of many images, one after the other
        a1….index            an entry an image: its hash, where its numbers are, their hash

A folder's name hashes all that the numbers depend on beside the image (`vlm_nemo.train.vision_cache`), an entry's key
the image's bytes and how it is cut: a tower that changed, or another way of cutting, finds nothing. Every process
appends to files of its own and reads everybody's; an entry is written when its numbers are, and both are hashed, so
whatever a kill or a bad disk left is noticed, counted and computed anew. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import threading
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vlm_nemo.data.layout.plan import Canvas
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.types import Images, UserError

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How often a process looks at most for what the others added."""
_ENTRY = struct.Struct("<32sQQI4x16s")
_CHECK = 8
"""Bytes of an entry's own hash, behind it."""
_NUMBERS, _INDEX = ".features", ".index"


class Place(NamedTuple):
    """Where the numbers of an image are."""

    file: str
    offset: int
    size: int
    """Bytes."""
    rows: int
    digest: bytes


def image_key(data: bytes, canvases: tuple[Canvas, ...]) -> bytes:
    """Of an encoded image, cut in this way: one that stands alone may be cut in another way than one of several."""
    return hashlib.sha256(hashlib.sha256(data).digest() + _words(canvases)).digest()


@lru_cache(maxsize=4096)
def _words(canvases: tuple[Canvas, ...]) -> bytes:
    return repr(canvases).encode()


class FeatureStore:
    """The features of one tower's images. Threads and processes may share its folder."""

    read_images: int
    """Images whose features came from here; counted by this process, as are the others."""
    kept_images: int
    damaged_images: int
    """Images whose numbers were not what was written; they are computed anew."""

    def __init__(self, folder: str, limit_gb: float, *, writers: int = 1) -> None:
        """limit_gb: of the whole folder, other towers' features included; writers: processes of this job that add.

        Nothing is found, and nobody gets past `wait`, before `open` said which tower it is. Raises UserError.
        """
        if limit_gb <= 0:
            raise UserError(f"data.vision_cache_gb={limit_gb:g} must be above 0; data.vision_cache=null keeps nothing")
        self.root = Path(folder).expanduser()
        self.read_images = self.kept_images = self.damaged_images = 0
        self._limit, self._writers = round(limit_gb * 1e9), writers
        self._places: dict[bytes, Place] = {}
        self._indexed: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()
        self._looked = 0.0
        self._own: tuple[BinaryIO, BinaryIO] | None = None
        self._name = ""
        self._room = 0
        self._end = 0
        self._opened = threading.Event()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.vision_cache={folder}: {error.strerror}; name a folder that can be made") from None

    def open(self, fingerprint: str, dtype: torch.dtype, about: dict[str, Any]) -> None:
        """Say which tower it is. about: the same for people."""
        self.folder, self._dtype = self.root / fingerprint, dtype
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "tower.json").exists():
            draft = self.folder / f".{uuid.uuid4().hex}.draft"
            draft.write_text(json.dumps(about, indent=1) + "\n")
            draft.replace(self.folder / "tower.json")
        held = sum(path.stat().st_size for path in self.root.glob(f"*/*{_NUMBERS}"))
        self._room = max(0, self._limit - held) // self._writers
        self._look()
        self._opened.set()

    def wait(self, stop: threading.Event) -> None:
        """Until `open` was called, or `stop` is set."""
        while not self._opened.wait(0.05) and not stop.is_set():
            pass

    def __contains__(self, key: bytes) -> bool:
        if key in self._places:
            return True
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, keys: Sequence[bytes], rows: Sequence[int]) -> Tensor | None:
        """[sum of rows, D]: of images one after the other; None where one is missing or damaged, or has other rows."""
        places = [self._places.get(key) for key in keys]
        if any(place is None or place.rows != n for place, n in zip(places, rows, strict=True)):
            return None
        known = [place for place in places if place is not None]
        held = torch.empty(sum(place.size for place in known), dtype=torch.uint8)
        view, at = memoryview(held.numpy()), 0
        for key, place in zip(keys, known, strict=True):
            part = view[at : at + place.size]
            at += place.size
            if not self._fill(part, place):
                with self._lock:
                    self._places.pop(key, None)
                    self.damaged_images += 1
                return None
        width, left = divmod(at // held.new_empty(0, dtype=self._dtype).element_size(), sum(rows))
        if left:
            return None
        self.read_images += len(keys)
        return held.view(self._dtype).view(sum(rows), width)

    def _fill(self, part: memoryview, place: Place) -> bool:
        try:
            file = self._files.get(place.file)
            if file is None:
                with self._lock:
                    file = self._files.setdefault(place.file, open(self.folder / place.file, "rb", buffering=0))
            whole = os.preadv(file.fileno(), [part], place.offset) == place.size
        except OSError:
            return False
        return whole and _digest(part) == place.digest

    def add(self, key: bytes, features: Tensor) -> None:
        """Keep what the tower made of an image, [rows, D] on the CPU; nothing where it is known or there is no room."""
        if key in self._places or not self._room:
            return
        data = features.contiguous().view(torch.uint8).flatten().numpy().data
        if self._end + len(data) > self._room:
            self._stop(f"data.vision_cache_gb={self._limit / 1e9:g} is full; raise it, or remove older folders in it")
            return
        try:
            numbers, index = self._own or self._create()
            place = Place(f"{self._name}{_NUMBERS}", self._end, len(data), len(features), _digest(data))
            entry = _entry(key, place)
            if numbers.write(data) != len(data) or index.write(entry) != len(entry):
                self._stop("the disk is full")
                return
        except OSError as error:
            self._stop(error.strerror or str(error))
            return
        self._end += len(data)
        self._places[key] = place
        self.kept_images += 1

    def _create(self) -> tuple[BinaryIO, BinaryIO]:
        self._name = uuid.uuid4().hex
        # Unbuffered: what `write` returned from is with the system, whatever becomes of this process
        numbers = open(self.folder / f"{self._name}{_NUMBERS}", "xb", buffering=0)
        self._own = numbers, open(self.folder / f"{self._name}{_INDEX}", "xb", buffering=0)
        self._indexed[f"{self._name}{_INDEX}"] = 1 << 62  # what is in there is known
        return self._own

    def _stop(self, why: str) -> None:
        self._room = 0
        log.warning("%s: nothing more is kept there, the tower computes what is missing (%s)", self.root, why)

    def _look(self) -> None:
        """Take in what the indexes tell that is not known yet; later files' entries stand for damaged earlier ones."""
        with self._lock:
            self._looked = time.monotonic()
            found = []
            for path in self.folder.glob(f"*{_INDEX}"):
                found.append((path.stat().st_mtime_ns, path))
            for _, path in sorted(found):
                known = self._indexed.get(path.name, 0)
                if path.stat().st_size - known < _ENTRY.size + _CHECK:
                    continue
                with path.open("rb") as file:
                    file.seek(known)
                    data = file.read()
                step = _ENTRY.size + _CHECK
                whole = len(data) // step * step
                for at in range(0, whole, step):
                    body, check = data[at : at + _ENTRY.size], data[at + _ENTRY.size : at + step]
                    if hashlib.blake2b(body, digest_size=_CHECK).digest() == check:
                        key, offset, size, rows, digest = _ENTRY.unpack(body)
                        self._places[key] = Place(path.name.replace(_INDEX, _NUMBERS), offset, size, rows, digest)
                self._indexed[path.name] = known + whole

    def close(self) -> None:
        """Close the files."""
        for file in (*self._files.values(), *(self._own or ())):
            file.close()
        self._files, self._own, self._room = {}, None, 0


def _digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _entry(key: bytes, place: Place) -> bytes:
    body = _ENTRY.pack(key, place.offset, place.size, place.rows, place.digest)
    return body + hashlib.blake2b(body, digest_size=_CHECK).digest()


def known_features(store: FeatureStore, samples: Sequence[EncodedSample], spec: ImageSpec) -> Tensor | None:
    """[N, D] of all images of these samples, if they are all in the store; None where one is not, or there is none."""
    keys = [key for sample in samples for key in sample.image_keys]
    if not keys or not all(key in store for key in keys):
        return None
    return store.read(keys, [n for sample in samples for n in feature_rows(sample.images, spec)])


def feature_rows(images: Images[Any], spec: ImageSpec) -> list[int]:
    """Rows that the tower gives for each image: its views' patches, and class tokens where they are kept."""
    found, at = [], 0
    grids = images.grids.tolist()
    for views in images.views.tolist():
        found.append(rows_of_grids(grids[at : at + views], spec))
        at += views
    return found


def rows_of_grids(grids: Sequence[Sequence[int]], spec: ImageSpec) -> int:
    """The same of one image with these views. A tower with tiles gives the unused ones too."""
    if spec.tiles is not None:
        return spec.tiles * (spec.grid[0] * spec.grid[1] + spec.class_token)
    return sum(rows * columns + spec.class_token for rows, columns in grids)
