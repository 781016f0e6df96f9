"""SIGTERM and Ctrl-C: noticed at once, whatever the main thread is doing.

JAX's own preemption service is polled, is swallowed by a second signal and is deaf during compilation. Here the
signals are blocked before JAX starts its threads, and one thread waits for them. The first one sets a flag, which the
train step carries to all hosts; while there is nothing to save yet it exits at once, and so does a second one always.
"""

import os
import signal
import sys
import threading

EXIT_PREEMPTED = 75  # interrupted, saved (or nothing to save): run the same command again
SIGNALS = {signal.SIGTERM, signal.SIGINT}


class Interrupt:
    """Whether this host was told to stop. Without `install` it never is."""

    def __init__(self) -> None:
        self.requested = False
        self._can_save = False

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT. Must run before JAX is imported: threads inherit the blocked signals."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._wait, name="interrupt", daemon=True).start()

    def can_save(self) -> None:
        """From now on a first signal is left to the training loop, which saves and exits."""
        self._can_save = True
        if self.requested:
            _exit("interrupted before the first step; nothing to save")

    def _wait(self) -> None:
        received = signal.sigwait(SIGNALS)
        self.requested = True
        name = signal.Signals(received).name
        if not self._can_save:
            _exit(f"{name} before the first step; nothing to save")
        print(f"\n{name}: saving, then exiting with code {EXIT_PREEMPTED}; once more exits at once", flush=True)
        name = signal.Signals(signal.sigwait(SIGNALS)).name
        _exit(f"{name} again: exiting without saving; the last complete checkpoint stands")


def _exit(message: str) -> None:
    print(f"\n{message}; run the same command to continue", flush=True)
    sys.stderr.flush()
    os._exit(EXIT_PREEMPTED)
