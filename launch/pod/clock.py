"""What time it is: this machine's clock may be wrong by days, and be set at any time."""

import datetime
import tempfile
import time
from pathlib import Path

from .gcloud import Gcloud


def now() -> float:
    """Seconds on a clock that nobody sets, and that counts a laptop's sleep where the system can."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def clock_commands(url: str, file: str) -> tuple[list[str], list[str]]:
    """What asks the bucket for the time: a write, and when that was."""
    write = ["storage", "cp", "--quiet", file, f"{url}/clock"]
    return write, ["storage", "objects", "describe", f"{url}/clock", "--format=value(update_time)"]


class BucketClock:
    """Seconds since 1970 by the bucket's clock, asked once: how far it is from one here that nobody sets.

    Where the bucket does not say, this machine's clock counts.
    """

    def __init__(self, gcloud: Gcloud, url: str) -> None:
        self._gcloud, self._url = gcloud, url
        self._ahead: float | None = None  # of `now`

    def time(self) -> float:
        if self._ahead is None:
            self._ahead = (self._written() or time.time()) - now()
        return now() + self._ahead

    def _written(self) -> float | None:
        """When the bucket says that it got what was written just now."""
        with tempfile.TemporaryDirectory(prefix="tpu_pod.") as folder:
            file = Path(folder) / "clock"
            file.write_text("written by launch/tpu_pod.sh to see what time it is\n")
            write, ask = clock_commands(self._url, str(file))
            if not self._gcloud.call(*write).ok:
                return None
        answer = self._gcloud.call(*ask)
        try:
            return datetime.datetime.fromisoformat(answer.out).timestamp() if answer.ok else None
        except ValueError:
            return None
