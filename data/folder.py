"""A folder, on the local disk or any fsspec filesystem (`gs://...`), where a file appears only when it is complete."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Folder:
    """`url` is a local path or an fsspec URL; names are relative to it. Picklable by its `url`."""

    def __init__(self, url: str):
        self.url = url
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple:
        return Folder, (self.url,)

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def exists(self, name: str) -> bool:
        return self._fs.exists(self.path(name))

    def size(self, name: str) -> int:
        """In bytes."""
        return self._fs.size(self.path(name))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file in [start, end)."""
        return self._fs.cat_file(self.path(name), start, end)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder and what is in it; nothing happens if there is none."""
        if self.exists(name):
            self._fs.rm(self.path(name), recursive=True)

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Gives a local path to write to; what was written becomes `name` at the end, at once, or never after an error.

        The path is unique, so that a writer that was taken for dead does no harm.
        """
        target = Path(self.path(name))
        if not self.is_local:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / target.name
                yield path
                self._fs.put_file(str(path), self.path(name))
            return
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


def _sync(path: Path) -> None:
    """What the rename makes visible must be on the disk before, and the rename itself after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
