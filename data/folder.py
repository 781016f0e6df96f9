"""A folder, on the local disk or any fsspec filesystem (`gs://...`), where a file appears only when it is complete."""

import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError
from data.sources import filesystem


class Folder:
    """`url` is a local path or an fsspec URL; names are relative to it. Equal, and pickled, by its `url`."""

    def __init__(self, url: str):
        self._fs, self._root = filesystem(url)
        self._root = self._root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self.url = self._root if self._is_local else url.rstrip("/")

    def __reduce__(self) -> tuple:
        return Folder, (self.url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    def exists(self, name: str) -> bool:
        return self._fs.exists(self._path(name))

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if there is no such file."""
        try:
            return self._fs.size(self._path(name))
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file in [start, end)."""
        return self._fs.cat_file(self._path(name), start, end)

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Gives a local path to write to; what was written becomes `name` at the end, at once, or never after an error.

        The path is unique, so that a writer that was taken for dead does no harm.
        """
        if not self._is_local:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "file"
                yield path
                self._fs.put_file(str(path), self._path(name))
            return
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            yield partial
            _sync(partial)
            partial.replace(target)
            _sync(target.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Removes the folder and what is in it, if there is one."""
        if self._fs.exists(self._root):
            self._fs.rm(self._root, recursive=True)

    def remove_partial(self) -> None:
        """Removes what killed writers left in a local folder; elsewhere they leave nothing in it."""
        if self._is_local:
            for partial in Path(self._root).glob(".*.partial"):
                partial.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the lock of a local folder; elsewhere there is none to hold.

        Raises:
          DataError: another process holds it.
        """
        if not self._is_local:
            yield
            return
        path = Path(self._path("lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another process is at work in {self.url}") from None
            yield

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _sync(path: Path) -> None:
    """What the rename makes visible must be on the disk before, and the rename itself after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
