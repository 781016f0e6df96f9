"""One process of `python -m trainer`, from its flags to its exit code."""

import functools
import logging
import os
import traceback
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import app
from tqdm.contrib.logging import logging_redirect_tqdm

from data import DataError, UnreachableError
from trainer.errors import (
    EXIT_CORRUPT,
    EXIT_DIVERGED,
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_MISTAKE,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    ConfigError,
    DivergedError,
    LeaseError,
    ReplicaError,
    ResumeError,
    StorageError,
)
from trainer.flags import CONFIG, INIT_FROM, OVERRIDE_RESUME, PROFILE_STEPS, WORKDIR
from trainer.hosts import compilation_cache, join, last_words
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.peers import Peers
from trainer.loop import train
from trainer.metrics.profile import parse_steps
from trainer.settings import read_settings


def run(interrupt: Interrupt, started_at: float, argv: Sequence[str]) -> NoReturn:
    """Trains what the flags ask for, and ends the process.

    Args:
      interrupt: Installed.
      started_at: When the process began, seconds of the monotonic clock, which nobody sets.
      argv: What is left of the command when the flags are taken out.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; values are given as --config.key=value")
    logger = logging.getLogger("trainer")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logger.setLevel(logging.INFO)  # of this program alone: Orbax and JAX say a great deal
    peers = None
    try:
        settings, traced = read_settings(CONFIG.value), parse_steps(PROFILE_STEPS.value)
        peers = join.initialize(settings.faults)
        interrupt.on_exit = functools.partial(_part, peers)
        compilation_cache.open_cache(settings.compilation_cache, str(WORKDIR.value))
        with logging_redirect_tqdm():
            code = train(
                settings,
                str(WORKDIR.value),
                interrupt,
                OVERRIDE_RESUME.value,
                started_at,
                profile_steps=traced,
                init_from=INIT_FROM.value,
            )
    except (LeaseError, StorageError, UnreachableError) as error:
        code = _say(f"error: {error}", EXIT_FAILED)
    except (ConfigError, ResumeError, DataError) as error:
        code = _say(f"error: {error}", EXIT_MISTAKE)
    except DivergedError as error:
        code = _say(f"error: {error}", EXIT_DIVERGED)
    except ReplicaError as error:
        code = _say(f"error: {error}", EXIT_CORRUPT)
    except Exception as error:
        last_words.say(traceback.format_exc().rstrip())
        code = EXIT_FAILED
        if peers is not None and isinstance(error, jax.errors.JaxRuntimeError):
            peers.wait_for_verdict()
        if "RESOURCE_EXHAUSTED" in str(error) and "No space left" not in str(error):
            advice = "--config.model.remat=block, a larger --config.mesh.fsdp or --config.accumulation need less"
            code = _say(f"error: the step does not fit the devices' memory; {advice}", EXIT_OUT_OF_MEMORY)
    if code != EXIT_FAILED:
        compilation_cache.part()
    if peers is not None:
        if code in (EXIT_FINISHED, EXIT_PREEMPTED):
            peers.stop_watching()
            jax.distributed.shutdown()
        else:
            peers.leave(code)
    # Not sys.exit: a host that leaves alone would wait for the others in JAX's shutdown barrier for minutes.
    os._exit(code)


def _part(peers: Peers | None, code: int) -> None:
    if code == EXIT_PREEMPTED:  # and not because this host hangs
        compilation_cache.part()
    if peers is not None:
        peers.leave(code)


def _say(message: str, code: int) -> int:
    last_words.say(message)
    return code
