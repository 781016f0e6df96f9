"""Trains one config.

    python -m trainer --config=configs/c4.py:d12 --workdir=DIR --config.data.path=DATASET [--config.key=value ...]

Run again with the same command, it continues from the newest checkpoint. Exit codes: 0 finished, 75 interrupted and
saved (run me again), 2 a mistake in the command, the config or the data that no retry will cure, anything else a
failure.
"""

from trainer.interrupt import Interrupt

interrupt = Interrupt()
if __name__ == "__main__":
    interrupt.install()  # before anything imports JAX

import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from data import DataError  # noqa: E402
from trainer.config import check_config  # noqa: E402
from trainer.errors import ConfigError, ResumeError  # noqa: E402
from trainer.loop import train  # noqa: E402

EXIT_MISTAKE = 2
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run's checkpoints, TensorBoard events and result.")
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/c4.py:d12", lock_config=True)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; values are given as --config.key=value")
    logging.set_verbosity(logging.INFO)
    try:
        check_config(CONFIG.value)
        code = train(CONFIG.value, WORKDIR.value, interrupt)
    except (ConfigError, ResumeError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_MISTAKE
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a host that leaves alone would wait for the others in JAX's shutdown barrier for minutes.
    os._exit(code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
