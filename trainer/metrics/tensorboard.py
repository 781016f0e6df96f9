"""Metrics as TensorBoard event files."""

import collections
import logging
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from trainer.metrics import summaries
from trainer.metrics.events import EventFile, mend
from trainer.metrics.writer import MetricsWriter
from trainer.settings import free_fields

logger = logging.getLogger("trainer")
_MOST_KEPT = 100_000  # events


class TensorBoardWriter(MetricsWriter):
    """Event files in `directory`.

    Storage that refuses them is no reason to stop training: they are kept, and written once it takes them again.
    """

    def __init__(self, directory: str, first_step: int) -> None:
        """`first_step`: as `withdraw`, of what earlier processes wrote."""
        self._directory = directory
        self._writer: EventFile | None = None
        self._kept: collections.deque[Event] = collections.deque(maxlen=_MOST_KEPT)  # not known to be in the file
        try:
            mend(directory)
        except OSError as error:
            logger.warning("TensorBoard's events cannot be looked at for damage: %s", error)
        self.withdraw(first_step)  # even from step 1: an earlier process may have died before its first checkpoint
        self._summarise(first_step, summaries.layout())
        self.flush()

    def withdraw(self, first_step: int) -> None:
        """What was written from this step on no longer holds, since it will be computed again."""
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point for every name. A slash in a name groups charts."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._summarise(step, *values)

    def text(self, step: int, name: str, markdown: str) -> None:
        self._summarise(step, summaries.text(f"run/{name}", markdown))  # one group: the tab opens the first ones only

    def image(self, step: int, name: str, png: bytes) -> None:
        self._summarise(step, summaries.image(name, png))

    def hparams(self, step: int, values: Mapping[str, bool | float | str]) -> None:
        """Of these the table shows what makes another run of it: how it is computed and kept is left out."""
        left_out = *free_fields(), "faults."
        kept = {name: value for name, value in values.items() if not name.startswith(left_out)}
        self._summarise(step, *summaries.hparams(kept))

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

    def _summarise(self, step: int, *values: Summary.Value) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        self._kept.append(event)
        try:
            if self._writer:
                self._writer.add(event)
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        logger.warning("TensorBoard's events cannot be written for now, and are kept: %s", error)
        self._writer = None
