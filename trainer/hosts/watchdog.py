"""A thread that ends this process when a step takes far too long, since nothing else notices a host that hangs."""

import collections
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

from trainer.errors import EXIT_PEER_LOST

_HISTORY = 100


class Watchdog:
    """Watches how long each piece of work takes, by the name of its kind, against the median of its kind."""

    def __init__(
        self,
        least_seconds: float,
        factor: float,
        first_seconds: float,
        on_exit: Callable[[int], None] = lambda code: None,
    ) -> None:
        """A piece of work may take `factor` times the median of its kind, at least `least_seconds`, and the first of
        its kind `first_seconds`: it may compile. After that all stacks are printed, `on_exit` is called with the exit
        code, and the process ends with it.
        """
        self._least, self._factor, self._first, self._on_exit = least_seconds, factor, first_seconds, on_exit
        self._seconds: dict[str, collections.deque[float]] = {}
        self._work: tuple[str, float, float] | None = None  # kind, start, limit
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, kind: str) -> None:
        """A piece of work of this kind begins, and the one before has ended."""
        self.end()
        seconds = self._seconds.setdefault(kind, collections.deque(maxlen=_HISTORY))
        limit = max(self._least, self._factor * statistics.median(seconds)) if seconds else self._first
        self._work = kind, time.monotonic(), limit

    def end(self) -> None:
        """The work has ended, and none begins."""
        if self._work is not None:
            kind, start, _ = self._work
            self._seconds[kind].append(time.monotonic() - start)
            self._work = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._least / 4))
            work = self._work
            if work is None or time.monotonic() - work[1] <= work[2]:
                continue
            kind, start, limit = work
            print(
                f"\n{kind} has taken {time.monotonic() - start:.0f} s, more than the limit of {limit:.0f} s: this host "
                f"or another one hangs; leaving with exit code {EXIT_PEER_LOST}. What every thread was doing:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            self._on_exit(EXIT_PEER_LOST)
            os._exit(EXIT_PEER_LOST)
