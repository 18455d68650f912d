"""One writer a folder: a lock that goes with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk says."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process alone.

    The kernel lets go when the process ends, so a killed one leaves nothing to tidy up; the file stays and means
    nothing by itself. Raises UserError if it cannot be made, or, with the process's name, if another holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise UserError(f"out={folder} cannot be written: {error}; choose another folder") from None
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"{folder} is being written by {_holder(path)}; wait for it, or stop it") from None
            # Some network file systems have no locks at all
            log.warning("%s cannot be locked (%s); nothing else may write there", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
