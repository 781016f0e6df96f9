"""The storage under a workdir: what an error of it means, which ones pass, and whether it can be written to at all."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import jax
from etils import epath

from data import files
from trainer.errors import ResumeError, StorageError

T = TypeVar("T")
logger = logging.getLogger("trainer")

_RETRY_SECONDS = 7.5  # for one operation
# Trying again does not cure these. Everything else that storage reports may pass: a server restarts, a mount returns.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
_LASTING |= {errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
_FULL = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota exceeded")
_FORBIDDEN = ("PERMISSION_DENIED", "Permission denied", "Operation not permitted", "Read-only file system")
_REFUSED = (*_FORBIDDEN, "Input/output error", "Stale file handle", "Transport endpoint", "UNAVAILABLE")


def retried(operation: Callable[[], T]) -> T:
    """`operation()`, tried again for some seconds while storage errors come that may pass soon."""
    return files.retried(
        operation, _RETRY_SECONDS, lambda error: isinstance(error, OSError) and error.errno not in _LASTING
    )


def retried_at_start(operation: Callable[[], T], seconds: float) -> T:
    """`operation()`, tried again for so long while storage refuses, whatever it says: its mount may be on the way."""
    return files.retried(operation, seconds, lambda error: isinstance(error, (OSError, StorageError)))


def refused(error: BaseException) -> bool:
    """Whether storage did not give what was asked for, which says nothing of what is there."""
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return any(
        (isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, missing))
        or any(word in str(cause) for word in _REFUSED)
        for cause in _causes(error)
    )


def of_storage(error: BaseException) -> bool:
    """Whether storage is behind an error of Orbax: refused, full, or something is not there."""
    return refused(error) or any(
        isinstance(cause, OSError) or any(word in str(cause) for word in _FULL) for cause in _causes(error)
    )


def _causes(error: BaseException) -> list[BaseException]:
    """`error` and what it came of, the innermost last."""
    causes = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(inner)
    return causes


def is_gone(folder: epath.Path, retry_seconds: float) -> bool:
    """Whether a folder that was there is not, though it was looked for again; for whoever would make it anew."""

    def look() -> None:
        if not folder.stat().is_directory:
            raise NotADirectoryError(folder)

    if "://" in os.fspath(folder):  # there are no folders
        return False
    missing = (FileNotFoundError, NotADirectoryError)
    try:
        files.retried(look, retry_seconds, lambda error: isinstance(error, missing))
    except missing:
        return True
    except OSError:
        pass  # whoever writes will say it
    return False


def gone_message(folder: epath.Path) -> str:
    """What to say then."""
    return (
        f"{folder} is gone: the workdir was moved, removed or unmounted during the run. It is not made anew; bring it "
        "back and run the same command again, or give --workdir where it is now"
    )


def write_file(path: epath.Path, content: str | bytes) -> None:
    """Writes a small file at once: whoever reads it, even after the power was cut, finds all of it, or what was there
    before. Object storage does so by itself.

    Raises:
      OSError: nothing is changed.
    """
    content = content.encode() if isinstance(content, str) else content
    if "://" in os.fspath(path):
        path.write_bytes(content)
        return
    temporary = path.parent / f"{path.name}.tmp"
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        _sync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself must be on the disk too
    try:
        _sync(folder)
    finally:
        os.close(folder)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot say so
            raise


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
    error = _causes(error)[-1]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"


def check_workdir(workdir: str, checkpoint_bytes: int = 0, retry_seconds: float = 0.0) -> None:
    """Makes the workdir and what is missing above it, and proves that a checkpoint can be written to it.

    Args:
      workdir: A path, or a URL such as gs://bucket/run.
      checkpoint_bytes: The size of a checkpoint before compression.
      retry_seconds: How long to try again while it cannot.

    Raises:
      ResumeError: it can never be: a file is in its place, or its disk is smaller than a checkpoint.
      StorageError: it cannot be written to now, or has no space for one more checkpoint: a new one is made before one
        is deleted.
    """
    retried_at_start(lambda: _probe(workdir, checkpoint_bytes), retry_seconds)


def _probe(workdir: str, checkpoint_bytes: int) -> None:
    path = epath.Path(workdir)
    try:
        for folder in (path, path / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write-probe-{os.getpid()}-{jax.process_index()}"
            probe.write_text("probe")
            probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise ResumeError(f"--workdir={workdir} cannot be written to: {error}") from error
    except OSError as error:
        raise StorageError(f"--workdir={workdir} cannot be written to: {error}") from error
    free = free_bytes(path)
    if free is not None and free < checkpoint_bytes:
        never = shutil.disk_usage(path).total < checkpoint_bytes
        raise (ResumeError if never else StorageError)(
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
