"""`python -m trainer` with a fault at a place that no test outside could hit.

python -m tests.support.faulty_trainer FAULT FLAGS...
"""

import os
import signal
import sys
import time
from typing import Any

from trainer.hosts.interrupt import SIGNALS, Interrupt


def sigterm_in_an_evaluation() -> None:
    """At the second evaluation: its first batch is dispatched when the signal was noticed."""
    from trainer import validation

    interrupts: list[Interrupt] = []
    evaluate, install, calls = validation.evaluate, Interrupt.install, []

    def remember(interrupt: Interrupt) -> None:
        interrupts.append(interrupt)
        install(interrupt)

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while not interrupts[0].requested:
                time.sleep(0.01)
        return evaluate(*arguments)

    validation.evaluate, Interrupt.install = interrupted, remember  # type: ignore[method-assign]


def a_compiler_that_hangs() -> None:
    from trainer import loop

    loop.compile_train_step = lambda *_: time.sleep(3600)


def a_close_that_hangs() -> None:
    from trainer.checkpoints.manager import Checkpoints

    Checkpoints.close = lambda _: time.sleep(3600)  # type: ignore[method-assign]


FAULTS = {fault.__name__: fault for fault in (sigterm_in_an_evaluation, a_compiler_that_hangs, a_close_that_hangs)}

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the trainer does before it imports JAX
    FAULTS[sys.argv.pop(1)]()
    from trainer.__main__ import main

    main()
