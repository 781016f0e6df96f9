"""The storage under a workdir: what an error of it means, which ones pass, and whether it can be written to at all."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

import jax
from etils import epath

from trainer.errors import ResumeError

T = TypeVar("T")
logger = logging.getLogger("trainer")

BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 4.0)  # between attempts at one operation
# Trying again does not cure these. Everything else that storage reports may pass: a server restarts, a mount returns.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
_LASTING |= {errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
_FULL = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota exceeded")
_FORBIDDEN = ("PERMISSION_DENIED", "Permission denied", "Operation not permitted", "Read-only file system")


def retried(operation: Callable[[], T]) -> T:
    """`operation()`, called again after each of BACK_OFF_SECONDS while storage errors come that may pass."""
    for seconds in BACK_OFF_SECONDS:
        try:
            return operation()
        except OSError as error:
            if error.errno in _LASTING:
                raise
            logger.warning("storage: %s; trying again in %.1f s", error, seconds)
            time.sleep(seconds)
    return operation()


def explain(error: BaseException, folder: epath.Path) -> str:
    """What went wrong with writing to `folder`, in a line: the cause, and what to do where that is known."""
    reason = root_cause(error)
    if any(word in reason for word in _FULL):
        return f"the disk of {folder} is full{_free(folder)}; free some space, or keep fewer checkpoints"
    if any(word in reason for word in _FORBIDDEN):
        return f"no permission to write to {folder}; restore it ({reason})"
    if isinstance(error, TimeoutError) and error.errno is None:  # not storage's own, which has a number
        return f"writing to {folder} took too long ({reason})"
    if "DEADLINE_EXCEEDED" in reason:
        return f"another host did not finish its part in time ({reason})"
    return reason


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause: Orbax wraps what happened several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"


def check_workdir(workdir: str, checkpoint_bytes: int = 0) -> None:
    """Makes the workdir and what is missing above it, and proves that a checkpoint can be written to it.

    Args:
      workdir: A path, or a URL such as gs://bucket/run.
      checkpoint_bytes: The size of a checkpoint before compression.

    Raises:
      ResumeError: it cannot be written to, or has no space for two checkpoints: a new one is made before one is
        deleted.
    """
    path = epath.Path(workdir)
    try:
        for folder in (path, path / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write-probe-{os.getpid()}-{jax.process_index()}"
            retried(lambda probe=probe: probe.write_text("probe"))  # type: ignore[misc]
            probe.unlink()
    except OSError as error:
        raise ResumeError(f"--workdir={workdir} cannot be written to: {error}") from error
    free = free_bytes(path)
    if free is not None and free < checkpoint_bytes:
        raise ResumeError(
            f"--workdir={workdir} has {free / 1e9:.2f} GB free, a checkpoint of this model needs "
            f"{checkpoint_bytes / 1e9:.2f} GB; free some space, or choose another --workdir"
        )


def free_bytes(path: epath.Path) -> int | None:
    """Bytes that can still be written at `path`; None where that has no limit or cannot be known (object stores)."""
    if "://" in os.fspath(path):
        return None
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _free(folder: epath.Path) -> str:
    free = free_bytes(folder)
    return "" if free is None else f" ({free / 1e6:.1f} MB free)"
