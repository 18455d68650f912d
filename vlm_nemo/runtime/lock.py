"""One writer a folder: a lock that goes with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk says."""
PATIENCE = 120.0
"""Seconds after which a network file system has let go of what a machine held that is gone (NFS: 90)."""
LOOK_SECONDS = 0.2


@contextmanager
def folder_lock(folder: Path, option: str, patience: float = 0.0) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process alone.

    The kernel lets go when the process ends, so a killed one leaves nothing to tidy up; the file stays and means
    nothing by itself. option: what names the folder on the command line. patience: seconds to wait for a holder on
    another machine, whose end may not be known here yet; one on this machine is alive. Raises UserError if the folder
    cannot be made, or, with the process's name, if another holds it; OSError where the disk is full.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise UserError(f"{option}={folder} cannot be written: {error}; choose another folder") from None
    with file:
        _take(file, path, patience)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)


@contextmanager
def job_lock(folder: Path, option: str) -> Iterator[None]:
    """The same for all ranks of a job: rank 0 holds it, each of them raises what rank 0 would."""
    import torch.distributed as dist  # takes seconds, and who locks alone has no ranks

    with ExitStack() as held:
        refused: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                held.enter_context(folder_lock(folder, option, PATIENCE))
            except (UserError, OSError) as error:
                refused = [str(error)]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise UserError(refused[0])
        yield


def _take(file: IO[str], path: Path, patience: float) -> None:
    said = False
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                # Some network file systems have no locks at all
                log.warning("%s cannot be locked (%s); nothing else may write there", path.parent, error.strerror)
                return
        holder = _holder(path)
        if time.monotonic() >= until or holder.endswith(f" on {socket.gethostname()}"):
            raise UserError(f"{path.parent} is being written by {holder}; wait for it, or stop it")
        if not said:
            said = True
            log.warning("%s is held by %s; waiting up to %.0f s for its end", path.parent, holder, patience)
        time.sleep(LOOK_SECONDS)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
