"""What the steps said, read one step late so that reading never keeps the devices waiting: by this the loop steers."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

from trainer import compilation_cache
from trainer.goodput import Phases
from trainer.hosts.requests import Request


class Outcome(NamedTuple):
    """One step, on the host."""

    step: int  # updates done with it
    metrics: dict[str, float]  # of `make_train_step`, but for the requests
    data_seconds: dict[str, float]  # how its batch came
    seconds: float  # since the step before was read, or since it began after a pause


class Outcomes:
    """The same on all hosts at the same point of the loop.

    Attributes:
      last_step: The newest step that was read.
      bad_steps: How many bad ones in a row end there.
      requests: What hosts have asked for and was not done yet; whoever does it takes it out.
    """

    def __init__(self, report: Callable[[Outcome], None], phases: Phases) -> None:
        """`report` is given every step that is read."""
        self.last_step, self.bad_steps = 0, 0
        self.requests: set[Request] = set()
        self._report, self._phases = report, phases
        self._pending: tuple[int, dict[str, Array], dict[str, float]] | None = None
        self._last_time: float | None = None

    def begin_step(self) -> None:
        """A step begins; after a pause its time counts from here."""
        if self._last_time is None:
            self._last_time = time.monotonic()

    def add(self, step: int, metrics: dict[str, Array], data_seconds: dict[str, float]) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before."""
        self._read()
        self._pending = step, metrics, data_seconds

    def drain(self) -> None:
        """Waits for the last step dispatched and reads it; the pause that follows is not counted as step time."""
        with self._phases("waiting for a training step"):
            self._read()
        self._last_time = None

    def forget(self) -> None:
        """After a rollback: the steps read so far are history."""
        self.bad_steps, self.requests = 0, set()

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics, data_seconds), self._pending = self._pending, None
        values = jax.device_get(metrics)
        compilation_cache.prove()
        self.requests |= {request for request in Request if values["requests"][request]}
        scalars = {name: float(value) for name, value in values.items() if name != "requests"}
        self.last_step, self.bad_steps = step, int(scalars["bad_steps"])
        now = time.monotonic()
        assert self._last_time is not None
        seconds, self._last_time = now - self._last_time, now
        self._report(Outcome(step, scalars, data_seconds, seconds))
