"""Trains one config.

    python -m trainer --config=configs/c4.py:d12 --workdir=DIR --config.data.path=DATASET [--config.key=value ...]

Run again with the same command, it continues from the newest sound checkpoint. Exit codes: 0 finished, 75 interrupted
and saved (run me again), 70 another host is gone or hangs (run all again); no retry will cure 2, a mistake in the
command, the config or the data, 3, out of memory, or 4, diverged; anything else is a failure that the log explains.
"""

import time

STARTED_AT = time.time()  # before the slow imports

from trainer.hosts.interrupt import Interrupt  # noqa: E402

interrupt = Interrupt()
if __name__ == "__main__":
    interrupt.install()  # before anything imports JAX

import logging  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import NoReturn  # noqa: E402

import jax  # noqa: E402
from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from tqdm.contrib.logging import logging_redirect_tqdm  # noqa: E402

from data import DataError  # noqa: E402
from trainer.config import check_config  # noqa: E402
from trainer.errors import (  # noqa: E402
    EXIT_DIVERGED,
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_MISTAKE,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    ConfigError,
    DivergedError,
    ReplicaError,
    ResumeError,
    StorageError,
)
from trainer.hosts import join as distributed  # noqa: E402
from trainer.loop import train  # noqa: E402

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run's checkpoints, TensorBoard events and result.")
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/c4.py:d12", lock_config=True)
OVERRIDE_RESUME = flags.DEFINE_multi_string(
    "override-resume",
    [],
    "Config field that may differ from the checkpoint's although it changes the mathematics or the order of the data, "
    "e.g. optimizer.peak_lr; may be given several times.",
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; values are given as --config.key=value")
    logger = logging.getLogger("trainer")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logger.setLevel(logging.INFO)  # of this program alone: Orbax and JAX say a great deal
    peers = None
    try:
        check_config(CONFIG.value)
        # A restart compiles nothing anew. JAX_COMPILATION_CACHE_DIR shares the cache between runs.
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", f"{WORKDIR.value}/compilation_cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        peers = distributed.initialize(CONFIG.value.faults)
        if peers is not None:
            interrupt.on_exit = peers.leave
        with logging_redirect_tqdm():
            code = train(CONFIG.value, str(WORKDIR.value), interrupt, OVERRIDE_RESUME.value, STARTED_AT)
    except (ConfigError, ResumeError, DataError) as error:
        code = _say(f"error: {error}", EXIT_MISTAKE)
    except DivergedError as error:
        code = _say(f"error: {error}", EXIT_DIVERGED)
    except (StorageError, ReplicaError) as error:
        code = _say(f"error: {error}", EXIT_FAILED)
    except Exception as error:
        traceback.print_exc()
        code = EXIT_FAILED
        if peers is not None and isinstance(error, jax.errors.JaxRuntimeError):
            peers.wait_for_verdict()
        if "RESOURCE_EXHAUSTED" in str(error) and "No space left" not in str(error):
            advice = "--config.model.remat=block, a larger --config.mesh.fsdp or --config.accumulation need less"
            code = _say(f"error: the step does not fit the devices' memory; {advice}", EXIT_OUT_OF_MEMORY)
    sys.stdout.flush()
    sys.stderr.flush()
    if peers is not None:
        if code in (EXIT_FINISHED, EXIT_PREEMPTED):
            peers.stop_watching()
            jax.distributed.shutdown()
        else:
            peers.leave(code)
    # Not sys.exit: a host that leaves alone would wait for the others in JAX's shutdown barrier for minutes.
    os._exit(code)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags; a mistake in them is one line that says what to do, and exit code 2."""
    for argument in argv:
        path = argument.removeprefix("--config=").partition(":")[0]
        if path != argument and not os.path.isfile(path):
            _exit_with(f"--config: there is no file {path}")
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an unknown --config.key; ml_collections adds the nearest one
        names = re.findall(r"\w+", str(error).replace("\\n", " "))
        nearest = f"; did you mean {names[4]}?" if names[1:4] == ["Did", "you", "mean"] else ""
        _exit_with(f"--config has no key {names[0]}{nearest}")
    except flags.Error as error:  # of a config file's own errors only the last line says what was wrong
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _exit_with(lines[-1].removeprefix("ValueError: "))


def _exit_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
