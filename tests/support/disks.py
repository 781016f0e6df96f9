"""File systems that stand still."""

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path


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
