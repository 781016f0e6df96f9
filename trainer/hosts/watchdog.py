"""A thread that ends this process when a step takes far too long, since nothing else notices a host that hangs."""

import collections
import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from trainer.errors import EXIT_PEER_LOST
from trainer.hosts import last_words

_HISTORY = 100


class _Work(NamedTuple):
    kind: str
    start: float  # seconds of the monotonic clock
    limit: float  # seconds that it may take


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
        self._work: _Work | None = None  # what is watched now
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watch(self, kind: str) -> Iterator[Callable[[], None]]:
        """The block is a piece of work of this kind; one around it is watched anew when the block has ended.

        Yields a function that ends the piece of work and begins the next of its kind. A piece that an exception ends is
        no example of its kind.
        """
        outer = self._work
        self._work = self._begin(kind)
        try:
            yield self._renew
            self._record()
        finally:
            self._work = outer and self._begin(outer.kind)

    def _begin(self, kind: str) -> _Work:
        seconds = self._seconds.setdefault(kind, collections.deque(maxlen=_HISTORY))
        limit = max(self._least, self._factor * statistics.median(seconds)) if seconds else self._first
        return _Work(kind, time.monotonic(), limit)

    def _record(self) -> None:
        assert self._work is not None
        self._seconds[self._work.kind].append(time.monotonic() - self._work.start)

    def _renew(self) -> None:
        assert self._work is not None
        self._record()
        self._work = self._begin(self._work.kind)

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._least / 4))
            work = self._work
            if work is None or time.monotonic() - work.start <= work.limit:
                continue
            try:
                last_words.say(
                    f"\n{work.kind} has taken {time.monotonic() - work.start:.0f} s, more than the limit of "
                    f"{work.limit:.0f} s: this host or another one hangs; leaving with exit code {EXIT_PEER_LOST}. "
                    "What every thread was doing:",
                    stacks=True,
                )
                self._on_exit(EXIT_PEER_LOST)
            finally:
                os._exit(EXIT_PEER_LOST)
