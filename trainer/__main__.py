"""Trains one config.

    python -m trainer --config=configs/c4.py:d12 --workdir=DIR --config.data.path=DATASET [--config.key=value ...]

Run again with the same command, it continues from the newest sound checkpoint. Exit codes: 0 finished, 75 interrupted
and saved (run me again), 70 another host is gone or hangs (run all again); no retry will cure 2, a mistake in the
command, the config or the data, 3, out of memory, 4, diverged, or 5, a chip that computes wrongly and that the message
names; anything else is a failure that the log explains.
"""

import functools
import time

from trainer.hosts.interrupt import Interrupt


def main() -> None:
    started_at, interrupt = time.monotonic(), Interrupt()
    interrupt.install()  # before anything imports JAX, and before these slow imports
    from absl import app, flags

    from trainer.command import run
    from trainer.flags import parse_flags

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(functools.partial(run, interrupt, started_at), flags_parser=parse_flags)


if __name__ == "__main__":
    main()
