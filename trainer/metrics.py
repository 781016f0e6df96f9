"""What a run says of itself: scalars in TensorBoard event files, written by process 0, and lines on the terminal."""

import collections
import logging
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tqdm import tqdm

from trainer.events import EventFile, mend
from trainer.goodput import Goodput
from trainer.outcomes import Outcome

logger = logging.getLogger("trainer")
_MOST_KEPT = 100_000  # events


class MetricsWriter:
    """TensorBoard scalars in `directory`; does nothing where `enabled` is false, so that every host can call it.

    Storage that refuses them is no reason to stop training: they are kept, and written once it takes them again.
    """

    def __init__(self, directory: str, first_step: int, enabled: bool = True) -> None:
        """`first_step`: as `withdraw`, of what earlier processes wrote."""
        self._directory, self._enabled = directory, enabled
        self._writer: EventFile | None = None
        self._kept: collections.deque[Event] = collections.deque(maxlen=_MOST_KEPT)  # not known to be in the file
        if enabled:
            try:
                mend(directory)
            except OSError as error:
                logger.warning("TensorBoard's events cannot be looked at for damage: %s", error)
        self.withdraw(first_step)  # even from step 1: an earlier process may have died before its first checkpoint
        self.flush()

    def withdraw(self, first_step: int) -> None:
        """What was written from this step on no longer holds, since it will be computed again."""
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point for every name. A slash in a name groups charts."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Returns when everything written so far is in the file, or storage has refused it."""
        if not self._kept:
            return
        try:
            if self._writer is None:
                # A file of its own: the one before may end in the middle of an event, where readers stop. What of these
                # events is in there already is withdrawn, so that no point is doubled.
                writer = EventFile(self._directory)
                start = min(event.step for event in self._kept)
                writer.add(Event(step=start, session_log=SessionLog(status=SessionLog.START)))
                for event in self._kept:
                    writer.add(event)
                self._writer = writer
            self._writer.flush()
            self._kept.clear()
        except OSError as error:
            self._refused(error)

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        if self._writer:
            self._writer.close()

    def _add(self, event: Event) -> None:
        if not self._enabled:
            return
        self._kept.append(event)
        try:
            if self._writer:
                self._writer.add(event)
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        logger.warning("TensorBoard's events cannot be written for now, and are kept: %s", error)
        self._writer = None


class StepLog:
    """Writes what steps said: to TensorBoard, to goodput, to the progress bar or, where there is none, in lines."""

    def __init__(
        self, writer: MetricsWriter, goodput: Goodput, every_steps: int, bar: tqdm, is_main: bool, started_at: float
    ) -> None:
        self._writer, self._goodput, self._every_steps, self._bar = writer, goodput, every_steps, bar
        self._is_main, self._started_at = is_main, started_at

    def write(self, outcome: Outcome) -> None:
        """To be called once for each step, in order."""
        step, metrics, data_seconds, seconds = outcome
        waited = min(seconds, data_seconds["wait_seconds"])
        self._goodput.add("data", waited)
        self._goodput.step(step, seconds - waited, metrics["loss"])
        times = {"step_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        self._writer.write(step, {f"train/{name}": value for name, value in (metrics | times).items()})
        self._writer.write(step, {f"data/{name}": value for name, value in data_seconds.items()})
        if self._started_at and self._is_main:
            logger.info("first step done %.1f s after the process began", time.monotonic() - self._started_at)
            self._started_at = 0.0
        self._bar.n = step
        self._bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        if self._bar.disable and self._is_main and step % self._every_steps == 0:
            logger.info("step %d loss %.4f, %.2f s a step", step, metrics["loss"], seconds)


def progress_bar(total: int, description: str, is_main: bool, initial: int = 0) -> tqdm:
    """On a terminal a bar; in a file nothing (None: only there), since lines are easier to read there."""
    return tqdm(total=total, initial=initial, desc=description, unit="step", disable=None if is_main else True)
