"""File systems that stand still, and one that stands in for a bucket."""

import contextlib
import dataclasses
import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


@dataclasses.dataclass
class FreezingDisk:
    """A file system whose writers can be made to wait."""

    folder: Path

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self.folder], check=True)


class Bucket(MemoryFileSystem):
    """Stands in for Google Cloud Storage, which tests have no account for."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://").replace("gcs://", "memory://"))


def bucket(monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """What gs:// is from now on, in this process: empty."""
    for name in ("gcs", "gs"):
        monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, name, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    return fsspec.filesystem("gcs")
