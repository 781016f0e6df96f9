"""Traces of a few steps, for TensorBoard's profile plugin and Perfetto: of steps named beforehand, or on demand."""

import logging
import threading
import time

import jax
from etils import epath

from trainer.errors import ConfigError
from trainer.hosts.requests import Request
from trainer.outcomes import Outcomes

PROFILE_FILE = "profile"  # in the workdir; whoever makes it asks for a trace
_STEPS = 5  # of a trace that is asked for so
_SECONDS_BETWEEN_LOOKS = 2.0
logger = logging.getLogger("trainer")


class Profiler:
    """Of one process; all hosts trace the same steps, each into a folder of its own in `tensorboard/plugins/profile`.

    Attributes:
      asked: Whether somebody asked this host for a trace, for `Request.PROFILE`.
    """

    def __init__(self, workdir: str, steps: range, is_main: bool) -> None:
        """`steps` are traced if they come."""
        self.asked = False
        self._folder, self._steps = f"{workdir}/tensorboard", steps
        self._file = epath.Path(workdir) / PROFILE_FILE
        self._lock = threading.Lock()
        self._traces, self._is_main = False, is_main
        if is_main:
            threading.Thread(target=self._look, name="profile", daemon=True).start()

    def before_step(self, step: int, outcomes: Outcomes) -> None:
        """Begins and ends a trace where it is time to; `step` is the one that is dispatched next."""
        if not self._traces and Request.PROFILE in outcomes.requests:
            self._steps = range(step, step + _STEPS)
        outcomes.requests.discard(Request.PROFILE)
        if not self._traces and step in self._steps:
            outcomes.drain()
            self._start(step)
        elif self._traces and step not in self._steps:
            outcomes.drain()
            self.stop()

    def stop(self) -> None:
        """Ends a trace that is under way."""
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()
            if self._is_main:
                logger.info("the trace is in %s/plugins/profile", self._folder)

    def _start(self, step: int) -> None:
        with self._lock:
            self._file.unlink(missing_ok=True)
            self.asked = False
        host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would hide the rest
        options.session_id = f"step_{step}{host}"
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._traces = True

    def _look(self) -> None:
        while True:
            with self._lock:
                self.asked = self._file.exists()
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def parse_steps(text: str) -> range:
    """The steps of a flag such as 100:105, which are 100 to 104; none of an empty one.

    Raises:
      ConfigError: it has no such form.
    """
    if not text:
        return range(0)
    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit() and 0 < int(first) < int(stop)):
        raise ConfigError(f"--profile_steps={text} must be FIRST:STOP with 0 < FIRST < STOP, such as 100:105")
    return range(int(first), int(stop))
