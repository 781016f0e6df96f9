"""The files of a dataset: read if they are files, and again if storage refuses for a moment."""

import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data.errors import DataError, UnreachableError

T = TypeVar("T")
logger = logging.getLogger("data")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 8.0
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def retried(
    operation: Callable[[], T],
    seconds: float,
    passes: Callable[[Exception], bool] = lambda error: isinstance(error, UnreachableError),
) -> T:
    """`operation()`, tried again for `seconds`, with pauses that double, while its error is one that `passes`."""
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return operation()
        except Exception as error:
            left = deadline - time.monotonic()
            if left <= 0 or not passes(error):
                raise
            logger.warning("storage: %s; trying again in %.1f s", error, min(pause, left))
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def file_size(path: Path) -> int:
    """In bytes.

    Raises:
      UnreachableError: it is not there, or storage does not say.
      DataError: it is no file. Opening a fifo would wait for ever.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UnreachableError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")
        raise DataError(f"{path} is {kind}, not a file; put the file itself there")
    return found.st_size


def read_file(path: Path) -> bytes:
    """All of it.

    Raises:
      UnreachableError, DataError: as `file_size`.
    """
    file_size(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreachableError(f"{path} cannot be read: {error.strerror}") from None
