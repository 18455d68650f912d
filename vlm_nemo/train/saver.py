"""Saves while the run goes on: copy to the host's memory, write in the background, publish when every rank is done.

    every rank, between two steps    copies its share (shares.py) to the host: all that a step is held up
    every rank, in the background    writes its files, hashes them, waits for the disk, leaves word on the job's board
    rank 0, in the background        when all words are there: links what is frozen, adds config, state and manifest,
                                     renames the folder, moves `latest`, removes what is too old, leaves word

Nothing of it is a collective, so no step waits for a disk. One save is under way at a time; the next one waits for it.
An error of any rank is known to all when they next agree to go on (`failed`), and `wait` raises it on all of them. One
that comes after the rename says that the checkpoint is there.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.runtime.host import HostCopies
from vlm_nemo.train import manifest, shares, tensors
from vlm_nemo.train.faults import Failed, words_of
from vlm_nemo.train.frozen import Frozen
from vlm_nemo.train.manifest import File
from vlm_nemo.train.room import Room, room_for
from vlm_nemo.train.tensors import UNUSED_FILE, Abandoned, Chunk
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.02
SAY_SECONDS = 60.0
UNUSED = f"weights/{UNUSED_FILE}"
GRACE_SECONDS = 60.0
"""What a run that ends leaves the ranks to finish the save that is under way: all of them end it together."""
BROKEN_SECONDS = 2.0
"""The same where this rank broke, or lost another, which may never write its part."""

_saves = itertools.count()
"""Every rank saves as often as every other."""


@dataclass(kw_only=True)
class _Job:
    """One save on its way to the disk."""

    step: int
    key: str
    """Of its words on the board."""
    files: dict[str, list[tuple[Chunk, Tensor]]]
    """Name in the step folder -> what this rank writes there."""
    state: str
    after: Callable[[], None] | None
    began: float
    held_up: float = 0.0
    """Seconds that the run stood still for it."""
    error: str | None = None
    written: bool = False
    """Rank 0: whether it is a checkpoint, so that an error is of what comes after."""

    @property
    def name(self) -> str:
        return f"checkpoint {manifest.step_folder(self.step)}"


class Saver:
    """Writes one run's checkpoints into one folder; all ranks make one together and call it alike."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: Ranks,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        write_extras: Callable[[Path], None],
        keep: int = 0,
        asynchronous: bool = False,
        frozen: Collection[str] = (),
        source: Path | None = None,
        fresh: Collection[str] = (),
        unused: Sequence[tuple[Chunk, Tensor]] = (),
    ) -> None:
        """write_extras(folder): adds config and tokenizer, on one rank, in the background. keep: how many of the newest
        to leave (0 = all). frozen: parts that do not learn. source: the checkpoint that the weights are from, but for
        the `fresh` parts. unused: what came with an imported model and goes on with it; rank 0's counts.
        """
        self.folder, self.ranks, self._optimizer = folder, ranks, optimizer
        self._write_extras, self._keep, self._unused = write_extras, keep, unused
        if ranks.main:
            folder.mkdir(parents=True, exist_ok=True)
            for draft in folder.glob(".step_*.draft"):
                shutil.rmtree(draft, ignore_errors=True)
        self._parameters = local_parameters(chunks)
        mine = shares.held(self._parameters, optimizer)
        self._shares = shares.agree(mine, frozen)  # no rank goes on before rank 0 has come here
        self._frozen = Frozen(folder, ranks, frozen)
        if source is not None:
            self._frozen.take_over(source, mine, fresh, self._shares.keys)
        self.room: Room = room_for(self._shares.loads["live"][ranks.rank])
        self.asynchronous = asynchronous and self.room.enough
        self._copies = HostCopies()
        self._board: dist.Store = groups.board()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        self._news: list[str] = []

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way went wrong: `wait` will say how, on all ranks."""
        return self._job is not None and self._job.error is not None

    def news(self) -> list[str]:
        """What was written since this was asked last, a line a checkpoint; on rank 0."""
        told, self._news = self._news, []
        return told

    def save(
        self, step: int, state: dict[str, Any], *, wait: bool = False, after: Callable[[], None] | None = None
    ) -> Path:
        """Write step_NNNNNN, as everything is now. Returns before it is on the disk unless `wait` or not asynchronous.

        state: plain data that resume needs. after: called on rank 0 when the checkpoint is the newest one.
        Waits for the save before, and raises its error.
        """
        began = time.perf_counter()
        self.wait()
        files: dict[str, list[tuple[Chunk, Tensor]]] = defaultdict(list)
        for part, chunk, values in self._shares.of(shares.held(self._parameters, self._optimizer)):
            if chunk.kind != shares.WEIGHT:
                files[f"optimizer/rank_{self.ranks.rank:05d}.safetensors"].append((chunk, values))
            elif part not in self._frozen.stored:
                files[f"weights/{part}_{self.ranks.rank:05d}.safetensors"].append((chunk, values))
        if self.ranks.main and not self._frozen.holds(UNUSED):
            files[UNUSED] = list(self._unused)
        in_background = self.asynchronous and not wait
        if in_background:  # what is frozen does not change under the writer's hands
            moving = {name: held for name, held in files.items() if not self._frozen.covers(name)}
            copies = iter(self._copies.take([values for held in moving.values() for _, values in held]))
            files |= {name: [(chunk, next(copies)) for chunk, _ in held] for name, held in moving.items()}
        self._job = _Job(
            step=step,
            key=f"save/{next(_saves)}",
            files=files,
            state=json.dumps({**state, "step": step}, indent=1, allow_nan=False) + "\n" if self.ranks.main else "",
            after=after,
            began=began,
        )
        self._job.held_up = time.perf_counter() - began
        if in_background:
            self._thread = threading.Thread(target=self._work, args=(self._job,), name="vlm_nemo save", daemon=True)
            self._thread.start()
        else:
            self._work(self._job)
            self.wait()
        return self.folder / manifest.step_folder(step)

    def wait(self) -> None:
        """Until nothing is under way. Raises, on all ranks, the error of any: UserError for a disk's, which names the
        file; RuntimeError, with the traceback, for a bug's."""
        job = self._job
        if job is None:
            return
        if self._thread is not None:
            self._thread.join()
        self._until(lambda: self._board.check([f"{job.key}/done"]), job)
        done = json.loads(self._board.get(f"{job.key}/done"))
        self._board.add(f"{job.key}/read", 1)
        if self.ranks.main:  # the board is this process's: it must not go before all have looked
            self._until(lambda: self._board.add(f"{job.key}/read", 0) == self.ranks.world, job)
            for word in (*self._words(job), f"{job.key}/done", f"{job.key}/read"):
                self._board.delete_key(word)
        self._job = self._thread = None
        if done["error"] is not None:
            raise (UserError if done["user"] else RuntimeError)(done["error"])
        self._frozen.all_stored()

    def _until(self, there: Callable[[], bool], job: _Job) -> None:
        said = time.monotonic()
        while not there():
            if time.monotonic() - said > SAY_SECONDS and self.ranks.rank < 2:
                said = time.monotonic()
                log.warning("%s is not on the disk yet, %.0f s so far", job.name, time.perf_counter() - job.began)
            time.sleep(LOOK_SECONDS)

    def _words(self, job: _Job) -> list[str]:
        """Where each rank says what it wrote."""
        return [f"{job.key}/{rank}" for rank in range(self.ranks.world)]

    def close(self, patience: float = GRACE_SECONDS) -> None:
        """Let a save that is under way finish, for so many seconds; raises nothing of it."""
        self._deadline = time.monotonic() + patience
        if self._thread is not None:
            self._thread.join()
        self._job = self._thread = None
        self._frozen.close()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(GRACE_SECONDS if kind is None or issubclass(kind, UserError) else BROKEN_SECONDS)

    def _work(self, job: _Job) -> None:
        """This rank's part, and on rank 0 the rest. Whatever goes wrong, the others hear of it."""
        said: dict[str, Any] = {"error": f"{job.name} was interrupted", "user": True}
        try:
            said = {"files": [asdict(file) for file in self._write(job)]}
        except Exception as error:
            said = words_of(error, job.name)
        finally:
            job.error = said.get("error")
            job.files.clear()
            self._board.set(f"{job.key}/{self.ranks.rank}", json.dumps(said))
        if not self.ranks.main:
            return
        done: dict[str, Any] = {"error": f"{job.name} was interrupted", "user": True}
        try:
            self._finish(job)
            done = {"error": None}
        except Exception as error:
            done = words_of(error, job.name, written=job.written)
            shutil.rmtree(self._draft(job), ignore_errors=True)
        finally:
            job.error = done["error"]
            self._board.set(f"{job.key}/done", json.dumps(done))

    def _write(self, job: _Job) -> list[File]:
        written = []
        for name, held in job.files.items():
            path = self._draft(job) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                found = tensors.write(path, held, self._late)
            except OSError as error:
                error.filename = error.filename or str(path)
                raise
            if found is not None:
                written.append(File(file=name, bytes=found[0], sha256=found[1]))
            held.clear()
        return written

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _finish(self, job: _Job) -> None:
        """Rank 0: make a checkpoint of what the ranks wrote. Raises Failed with the words of one that did not."""
        words = self._words(job)
        while not self._board.check(words):
            if self._late():
                raise Abandoned(f"{job.name}: not all ranks wrote their files")
            time.sleep(LOOK_SECONDS)
        said = [json.loads(self._board.get(word)) for word in words]
        for one in said:
            if "error" in one:
                raise Failed(one)
        files = [File(**entry) for one in said for entry in one["files"]]
        draft, final = self._draft(job), self.folder / manifest.step_folder(job.step)
        (draft / "weights").mkdir(parents=True, exist_ok=True)
        linked = self._frozen.link_into(draft)
        self._write_extras(draft)
        (draft / "state.json").write_text(job.state)
        about = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "layout": self.ranks.sizes,
            "frozen": sorted(self._frozen.parts),
        }
        manifest.write_manifest(draft, [*files, *linked], about)
        try:
            manifest.publish(draft, final)
        finally:
            job.written = not draft.exists()  # renamed, whatever else of it went wrong
        self._frozen.keep(final, files)
        manifest.drop_all_but(self.folder, self._keep)
        if job.after is not None:
            job.after()
        self._news.append(
            f"checkpoint {final.name}: the step was held up {job.held_up:.2f} s, on the disk after "
            f"{time.perf_counter() - job.began:.2f} s; {manifest.total_bytes(files) / 1e6:,.1f} MB written"
            + (f", {manifest.total_bytes(linked) / 1e6:,.1f} MB shared with the one before" if linked else "")
        )

    def _draft(self, job: _Job) -> Path:
        return self.folder / manifest.draft_folder(job.step)
