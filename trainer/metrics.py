"""Scalars to TensorBoard event files, written by process 0."""

import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class MetricsWriter:
    """TensorBoard scalars in `directory`; does nothing where `enabled` is false, so that every host can call it."""

    def __init__(self, directory: str, first_step: int, enabled: bool = True) -> None:
        """`first_step`: what earlier runs wrote from this step on is withdrawn, since it will be computed again."""
        self._writer = EventFileWriter(directory) if enabled else None
        if self._writer and first_step > 0:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point for every name. A slash in a name groups charts."""
        if self._writer:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Returns when everything written so far is in the file."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer:
            self._writer.close()
