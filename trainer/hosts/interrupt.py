"""SIGTERM and Ctrl-C: noticed at once, whatever the main thread is doing.

JAX's own preemption service is polled, is swallowed by a second signal and is deaf during compilation. Here the
signals are blocked before JAX starts its threads, and one thread waits for them. The first one sets a flag, which the
train step carries to all hosts; while there is nothing to save yet it exits at once, and so does a second one always.
"""

import os
import signal
import threading
from collections.abc import Callable

from trainer.errors import EXIT_PREEMPTED
from trainer.hosts import last_words

SIGNALS = {signal.SIGTERM, signal.SIGINT}


class Interrupt:
    """Whether this host was told to stop. Without `install` it never is."""

    def __init__(self) -> None:
        self.requested = False
        self.on_exit: Callable[[int], None] = lambda code: None  # called before this host exits on its own
        self._saving_seconds: float | None = None

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT. Must run before JAX is imported: threads inherit the blocked signals."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._wait, name="interrupt", daemon=True).start()

    def can_save(self, within_seconds: float) -> None:
        """From now on a first signal is left to the training loop, which saves and exits; if it has not done so after
        `within_seconds`, this process exits without.
        """
        self._saving_seconds = within_seconds
        if self.requested:
            self._exit("interrupted before the first step; nothing to save")

    def _wait(self) -> None:
        received = signal.sigwait(SIGNALS)
        self.requested = True
        name = signal.Signals(received).name
        if self._saving_seconds is None:
            self._exit(f"{name} before the first step; nothing to save")
            return
        last_words.say(f"\n{name}: saving, then exiting with code {EXIT_PREEMPTED}; once more exits at once")
        again = signal.sigtimedwait(SIGNALS, self._saving_seconds)
        why = f"not saved within {self._saving_seconds:.0f} s" if again is None else f"{name} again"
        self._exit(f"{why}: exiting without saving; the last complete checkpoint stands")

    def _exit(self, message: str) -> None:
        try:
            last_words.say(f"\n{message}; run the same command to continue")
            self.on_exit(EXIT_PREEMPTED)
        finally:
            os._exit(EXIT_PREEMPTED)
