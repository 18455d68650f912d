"""What went wrong with a save, in words that a rank leaves for the others."""

from __future__ import annotations

import errno
import traceback
from typing import Any

from vlm_nemo.train.tensors import Abandoned
from vlm_nemo.types import UserError


class Failed(Exception):
    """Words of a rank whose part went wrong."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__(said["error"])
        self.said = said


def words_of(error: Exception, what: str, *, written: bool = False) -> dict[str, Any]:
    """error: one line that names the file, or a traceback where it is a bug; user: whether it is not.

    what: was not written because of it, or is `written` and whole: it was what comes after that went wrong.
    """
    if isinstance(error, Failed):
        return error.said
    begin = f"{what} is whole on the disk, but then came an error" if written else f"{what} was not written"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        newest = "" if written else "; the one before is the newest"
        remedy = "; free some space, then start the run again" if full else ""
        return {"error": f"{begin}: {why}{where}{newest}{remedy}", "user": True}
    if isinstance(error, UserError | Abandoned):
        return {"error": f"{begin}: {error}", "user": True}
    return {"error": f"{begin}:\n{''.join(traceback.format_exception(error))}", "user": False}
