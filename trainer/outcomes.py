"""What the steps said, read one step late so that reading never keeps the devices waiting: by this the loop steers."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from trainer.goodput import Phases
from trainer.hosts import compilation_cache
from trainer.hosts.requests import Request
from trainer.metrics.thinning import is_kept
from trainer.step import Metrics

NORMS_EVERY = 100  # steps


class Outcome(NamedTuple):
    """One step, on the host."""

    step: int  # updates done with it
    metrics: dict[str, float]  # the scalars of `make_train_step`
    norms: dict[str, dict[str, Any]] | None  # its norms, of every so many steps and of bad ones
    loading_seconds: float  # that its batch took to load, ahead of the loop
    wait_seconds: float  # that the loop waited for it
    seconds: float  # since the step before was read, or since it began after a pause
    own_seconds: float  # of these, those that this host did not wait for the devices


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
        self._pending: tuple[int, Metrics, float, float] | None = None
        self._last_time: float | None = None

    def begin_step(self) -> None:
        """A step begins; after a pause its time counts from here."""
        if self._last_time is None:
            self._last_time = time.monotonic()

    def add(self, step: int, metrics: Metrics, loading_seconds: float, wait_seconds: float) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before."""
        self._read()
        self._pending = step, metrics, loading_seconds, wait_seconds

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
        (step, metrics, loading_seconds, wait_seconds), self._pending = self._pending, None
        norms = metrics.pop("norms")
        start = time.monotonic()
        values = jax.device_get(metrics)
        blocked = time.monotonic() - start
        compilation_cache.prove()
        self.requests |= {request for request in Request if values["requests"][request]}
        scalars = {name: float(value) for name, value in values.items() if name != "requests"}
        self.last_step, self.bad_steps = step, int(scalars["bad_steps"])
        wanted = is_kept(step, NORMS_EVERY) or self.bad_steps
        norms = jax.device_get(norms) if wanted else None
        now = time.monotonic()
        assert self._last_time is not None
        seconds, self._last_time = now - self._last_time, now
        own_seconds = max(0.0, seconds - blocked)
        self._report(Outcome(step, scalars, norms, loading_seconds, wait_seconds, seconds, own_seconds))
