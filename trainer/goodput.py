"""Where a run's time went, over all its starts: kept in the workdir, shown in TensorBoard and at exit."""

import collections
import contextlib
import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from trainer.checkpoints.disk import write_file
from trainer.hosts.watchdog import Watchdog

logger = logging.getLogger("trainer")
GOODPUT_FILE = "goodput.json"
CAUSES = (
    "steps",  # made for the first time
    "repeated_steps",  # made before, and lost with the process that made them
    "stalls",  # what steps took beyond three times their median
    "start_up",  # until the devices were ready
    "compile",  # waiting for the compiler
    "restore",  # reading a checkpoint, or making the first state
    "data",  # steps waiting for their batch
    "saving",  # the loop waiting for checkpoints
    "evaluation",
    "down",  # from the last sign of life to the next start
    "other",
)
_STALL_FACTOR = 3.0
_SECONDS_BETWEEN_WRITES = 10.0


class Goodput:
    """Seconds by cause, which add up to the time since the run was first started.

    Goodput is the share of `steps`. Every host counts, process 0 keeps the file.
    """

    def __init__(self, workdir: str, started_at: float, is_main: bool) -> None:
        """`started_at`: when this process began, seconds of the monotonic clock. Goes on from the workdir's file; one
        that cannot be read is renamed, with a warning, and counting begins anew.
        """
        self._path = epath.Path(workdir) / GOODPUT_FILE
        self._is_main, self._started_at = is_main, started_at
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=100)
        self._first_started_at = time.time() - (time.monotonic() - started_at)
        self._highest_step, self._starts = 0, 1
        self._last_loss: float | None = None
        self._last_write = 0.0
        try:
            if (saved := read_goodput(self._path)) is not None:
                # Only between processes is there no other clock than the wall's, which may have been set back.
                down = max(0.0, self._first_started_at - saved["updated_at"])
                self._seconds |= saved["seconds"]
                self._seconds["down"] += down
                self._first_started_at, self._highest_step = saved["first_started_at"], saved["highest_step"]
                self._starts, self._last_loss = saved["starts"] + 1, saved["loss"]
        except (OSError, ValueError) as error:
            if is_main:
                self._set_aside(error)
        self._seconds_before = sum(self._seconds.values())
        self._seconds["other"] = 0.0  # is what the others leave

    @contextlib.contextmanager
    def span(self, cause: str) -> Iterator[None]:
        """The block's time has this cause."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[cause] += time.monotonic() - start

    def add(self, cause: str, seconds: float) -> None:
        """So much time had this cause."""
        self._seconds[cause] += seconds

    def step(self, step: int, seconds: float, loss: float) -> None:
        """Step number `step` took so long, without its wait for data."""
        if self._step_seconds:
            usual = statistics.median(self._step_seconds) * _STALL_FACTOR
            self._seconds["stalls"] += max(0.0, seconds - usual)
            seconds = min(seconds, usual)
        self._step_seconds.append(seconds)
        self._seconds["steps" if step > self._highest_step else "repeated_steps"] += seconds
        self._highest_step = max(self._highest_step, step)
        self._last_loss = loss
        if time.monotonic() - self._last_write > _SECONDS_BETWEEN_WRITES:
            self.write()

    def seconds(self) -> dict[str, float]:
        """Seconds of every cause until now."""
        total = self._seconds_before + time.monotonic() - self._started_at
        return self._seconds | {"other": max(0.0, total - sum(self._seconds.values()))}

    def scalars(self) -> dict[str, float]:
        """For the writers: the share of time spent on new steps, and every cause's seconds."""
        return {"run/goodput": self.fraction(), **{f"time/{cause}_seconds": s for cause, s in self.seconds().items()}}

    def fraction(self) -> float:
        """The share of time spent on new steps."""
        return shares(self.seconds())["steps"]

    @property
    def starts(self) -> int:
        """How often the run was started."""
        return self._starts

    def write(self) -> None:
        """Brings the workdir's file up to date. Storage that refuses it is no reason to stop training."""
        self._last_write = time.monotonic()
        if not self._is_main:
            return
        content = {
            "seconds": self.seconds(),
            "goodput": self.fraction(),
            "starts": self._starts,
            "highest_step": self._highest_step,
            "loss": self._last_loss,
            "first_started_at": self._first_started_at,
            "updated_at": time.time(),
        }
        try:
            write_file(self._path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written for now: %s", self._path, error)

    def _set_aside(self, error: Exception) -> None:
        aside = self._path.with_name(f"{GOODPUT_FILE}.damaged-{time.time_ns()}")
        try:
            self._path.rename(aside)
        except OSError as refusal:
            logger.warning("%s cannot be read (%s), nor renamed (%s); counting anew", self._path, error, refusal)
        else:
            logger.warning("%s cannot be read (%s); it is now %s; counting anew", self._path, error, aside.name)

    def summary(self) -> str:
        """One line for people."""
        seconds = self.seconds()
        starts = f"{sum(seconds.values()) / 3600:.2f} h in {self._starts} start{'s' if self._starts > 1 else ''}"
        return f"goodput {shares(seconds)['steps']:.0%} of {starts}; the rest: {the_rest(seconds)}"


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """The share of all time that each cause had."""
    total = max(sum(seconds.values()), 1e-9)
    return {cause: value / total for cause, value in seconds.items()}


def the_rest(seconds: Mapping[str, float]) -> str:
    """What took the time that `steps` did not, for people: the largest first, without what rounds to nothing."""
    found = sorted(((share, cause) for cause, share in shares(seconds).items() if cause != "steps"), reverse=True)
    return ", ".join(f"{cause.replace('_', ' ')} {share:.0%}" for share, cause in found if share >= 0.005) or "nothing"


def read_goodput(path: epath.Path) -> dict[str, Any] | None:
    """What `Goodput.write` wrote: seconds (by cause), goodput, starts, highest_step, loss, and first_started_at and
    updated_at in seconds since the epoch; None if there is no file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is something else.
    """
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    try:
        numbers = [*(saved["seconds"][cause] for cause in CAUSES), saved["highest_step"], saved["starts"]]
        numbers += [saved["first_started_at"], saved["updated_at"]]
        if not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
            raise ValueError("a number is missing, negative or not finite")
        if not isinstance(saved["loss"], (float, int, type(None))):
            raise ValueError(f"its loss is {saved['loss']!r}")
        return saved | {"seconds": {cause: saved["seconds"][cause] for cause in CAUSES}}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not what this trainer wrote: {type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phases of a run: each is watched while it lasts, and its time has a cause. A call gives one's context."""

    watchdog: Watchdog
    goodput: Goodput

    @contextlib.contextmanager
    def __call__(self, kind: str, cause: str | None = None) -> Iterator[Callable[[], None]]:
        """The block is work of this kind, for the watchdog, and its seconds have this cause, for goodput: None leaves
        them to the steps. Both end with the block, however it ends. Yields `Watchdog.watch`'s function.
        """
        with self.watchdog.watch(kind) as renew, self.goodput.span(cause) if cause else contextlib.nullcontext():
            yield renew
