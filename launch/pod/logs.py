"""The logs of a run's hosts, which their workers send in parts: attempts/N/logs/host-I/FIRST_BYTE.

A slice of an earlier version wrote attempts/N/host-I.log, the whole of it again and again; that is read too.
"""

import bisect
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .gcloud import Gcloud, Kind
from .hosts import Worker
from .record import Run
from .terminal import BlockedError, UsageError, printable

_BATCH = 500  # parts that one call loads


class Log:
    """The log of a host, of which each look prints what it has gained."""

    def __init__(self, gcloud: Gcloud, run: Run, host: int, prefix: str = "", tail: int = 16384) -> None:
        self._gcloud, self._run, self._host, self._prefix = gcloud, run, host, prefix
        self._seen, self._tail = 0, tail  # bytes; of a log that is long already only the end is printed

    def restart(self) -> None:
        self._seen = self._tail = 0

    def follow(self, workers: list[Worker], attempt: int) -> None:
        """Prints what the worker has sent since; what cannot be read now comes next time."""
        size = next((worker.log_bytes for worker in workers if worker.host == self._host), 0)
        if size <= self._seen:
            return
        if self._tail and self._seen == 0:
            self._seen = max(0, size - self._tail)
        try:
            parts = self._parts(attempt)
            if not parts:
                self._follow_whole(attempt, size)
            for text in self._read(attempt, parts):
                self._print(text)
        except BlockedError:
            return

    def show(self, attempt: int, tail: int) -> None:
        """Prints the last `tail` lines, or with 0 all. Raises UsageError where there is no log, BlockedError."""
        parts = self._parts(attempt)
        if not parts:
            answer = self._gcloud.cat(self._whole(attempt))
            if not answer.ok:
                raise UsageError(f"no log of host {self._host} in attempt {attempt} ({answer.kind})")
            self._print("\n".join(answer.out.split("\n")[-tail:]))
            return
        if not tail:
            for text in self._read(attempt, parts):
                self._print(text)
            return
        count, lines = 0, list[str]()
        while len(lines) < tail and count < len(parts):
            count = count * 8 or 16
            self._seen = parts[-count] if count < len(parts) else 0
            lines = "\n".join(self._read(attempt, parts)).split("\n")
        self._print("\n".join(lines[-tail:]))

    def _parts(self, attempt: int) -> list[int]:
        """Their first bytes, in order. Raises BlockedError."""
        answer = self._gcloud.ask("storage", "ls", f"{self._folder(attempt)}/")
        if not answer.ok and answer.kind is not Kind.ABSENT:
            raise BlockedError(f"cannot read {self._folder(attempt)}: {answer.reason}")
        names = [line.rpartition("/")[2] for line in answer.out.splitlines()]
        return sorted(int(name) for name in names if re.fullmatch("[0-9]{15}", name))

    def _read(self, attempt: int, parts: list[int]) -> Iterator[str]:
        """What comes after what was seen, some parts at a time; they end with whole lines. Raises BlockedError."""
        parts = parts[max(0, bisect.bisect_right(parts, self._seen) - 1) :]
        for batch in (parts[i : i + _BATCH] for i in range(0, len(parts), _BATCH)):
            with tempfile.TemporaryDirectory(prefix="tpu_pod.") as folder:
                names = [f"{part:015d}" for part in batch]
                urls = [f"{self._folder(attempt)}/{name}" for name in names]
                answer = self._gcloud.ask("storage", "cp", "--quiet", *urls, folder)
                if not answer.ok:
                    raise BlockedError(f"cannot read {self._folder(attempt)}: {answer.reason}")
                text = b""
                for part, name in zip(batch, names, strict=True):
                    content = (Path(folder) / name).read_bytes()
                    text += content[max(0, self._seen - part) :]
                    self._seen = max(self._seen, part + len(content))
            if text:
                yield text.decode(errors="replace").removesuffix("\n")

    def _follow_whole(self, attempt: int, size: int) -> None:
        answer = self._gcloud.cat(self._whole(attempt), f"--range={self._seen}-{size - 1}")
        if answer.ok:
            self._seen = size
            self._print(answer.out)

    def _folder(self, attempt: int) -> str:
        return f"{self._run.url}/attempts/{attempt}/logs/host-{self._host}"

    def _whole(self, attempt: int) -> str:
        return f"{self._run.url}/attempts/{attempt}/host-{self._host}.log"

    def _print(self, text: str) -> None:
        print("\n".join(self._prefix + line for line in printable(text).split("\n")), flush=True)
