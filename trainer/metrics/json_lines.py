"""Metrics as JSON lines, for reports and notebooks: `metrics.jsonl` in the workdir, and how to read it.

Each line is an object with `time`, seconds since the epoch, and one of

    {"start": 41}                               a process begins to make steps 41, 42, ...
    {"rollback": 41}                            the run goes back, and makes them again
    {"step": 41, "run/loss": 2.31, ...}         scalars after update 41; "NaN", "Infinity" and "-Infinity" as text
    {"step": 41, "text": "config", "value": "..."}
    {"step": 41, "hparams": {"seed": 0, ...}}

`start` and `rollback` withdraw what was written from that step on. The text `failure` is why a process ended. A process
that was killed may have left half a line, which ends where the next one starts. `pandas.read_json(path, lines=True)`
reads it too, withdrawn points included.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from etils import epath

from trainer.metrics.writer import MetricsWriter

METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger("trainer")
_MOST_KEPT = 100_000  # lines
_SECONDS_BETWEEN_FLUSHES = 10.0  # or, where that is longer,
_FLUSHES_APART = 100.0  # times what one takes: in a bucket the whole file is written each time, and the loop waits
_NOT_SCALARS = ("step", "time")


class JsonLinesWriter(MetricsWriter):
    """Appends to a file, and puts off what storage refuses. Pictures are left out."""

    def __init__(self, path: epath.PathLike, first_step: int) -> None:
        """`first_step`: the first that this process makes, which withdraws what earlier ones wrote from there on."""
        self._path = epath.Path(path)
        self._kept: collections.deque[str] = collections.deque(maxlen=_MOST_KEPT)  # not in the file yet
        self._last_flush, self._flush_seconds = -math.inf, 0.0
        self._add({"start": first_step})

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._add({"step": step, **{name: _to_json(value) for name, value in scalars.items()}})

    def text(self, step: int, name: str, markdown: str) -> None:
        self._add({"step": step, "text": name, "value": markdown})

    def hparams(self, step: int, values: Mapping[str, bool | float | str]) -> None:
        self._add({"step": step, "hparams": dict(values)})

    def withdraw(self, first_step: int) -> None:
        self._add({"rollback": first_step})

    def flush(self) -> None:
        """Appends what is kept. An object in a bucket cannot be appended to, and is written anew."""
        start = time.monotonic()
        try:
            _append(self._path, "".join(self._kept).encode())
            self._kept.clear()
        except OSError as error:
            logger.warning("%s cannot be written for now, its lines are kept: %s", self._path, error)
        self._last_flush = time.monotonic()
        self._flush_seconds = self._last_flush - start

    def close(self) -> None:
        self.flush()

    def _add(self, content: dict[str, Any]) -> None:
        content["time"] = round(time.time(), 3)
        self._kept.append(json.dumps(content, allow_nan=False) + "\n")
        if time.monotonic() - self._last_flush > max(_SECONDS_BETWEEN_FLUSHES, _FLUSHES_APART * self._flush_seconds):
            self.flush()


@dataclasses.dataclass(frozen=True)
class Series:
    """One scalar: each step once, ascending."""

    steps: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)  # seconds since the epoch

    def withdraw(self, first_step: int) -> None:
        """Forgets all from this step on."""
        end = bisect_left(self.steps, first_step)
        del self.steps[end:], self.values[end:], self.times[end:]


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a process began, or a rollback went back to."""

    first_step: int  # the first that was made then
    time: float  # seconds since the epoch
    is_rollback: bool


@dataclasses.dataclass(frozen=True)
class RunMetrics:
    """What a run has written so far, without what was withdrawn."""

    scalars: dict[str, Series]
    texts: dict[str, str]  # the newest of each name; `failure` only of the last process
    hparams: dict[str, bool | float | str]  # the newest
    begins: list[Begin]  # the first start, then every restart and rollback

    def table(self, name: str) -> dict[str, str]:
        """The rows of a text that is a table, as `environment` and `config`."""
        rows = (line.strip("| ").split(" | ", 1) for line in self.texts.get(name, "").splitlines())
        return {row[0]: row[1] for row in rows if len(row) == 2}


def read_metrics(workdir: epath.PathLike) -> RunMetrics:
    """What `metrics.jsonl` in a workdir says, also of a run that goes on or has crashed. Broken lines, as the last may
    be, are left out. Of a run that has written nothing, nothing.

    Raises:
      OSError: the file is there and cannot be read.
    """
    metrics = RunMetrics({}, {}, {}, [])
    path = epath.Path(workdir) / METRICS_FILE
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                _take(json.loads(line), metrics)
            except (ValueError, KeyError, TypeError):
                continue
    return metrics


def _take(content: dict[str, Any], metrics: RunMetrics) -> None:
    when = float(content["time"])
    for kind in ("start", "rollback"):
        if kind in content:
            first_step = int(content[kind])
            metrics.begins.append(Begin(first_step, when, kind == "rollback"))
            metrics.texts.pop("failure", None)
            for series in metrics.scalars.values():
                series.withdraw(first_step)
            return
    step = int(content["step"])
    if "hparams" in content:
        metrics.hparams.clear()
        metrics.hparams.update(content["hparams"])
    elif "text" in content:
        metrics.texts[content["text"]] = content["value"]
    else:
        values = {name: float(value) for name, value in content.items() if name not in _NOT_SCALARS}
        for name, value in values.items():
            series = metrics.scalars.setdefault(name, Series())
            series.withdraw(step)  # of a line whose withdrawal is broken
            series.steps.append(step)
            series.values.append(value)
            series.times.append(when)


def _to_json(value: float) -> float | str:
    """Nine digits tell all float32 values apart; JSON has no infinity."""
    if math.isfinite(value):
        return float(f"{value:.9g}")
    return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"


def _append(path: epath.Path, content: bytes) -> None:
    """All of `content` or, where an OSError is raised, none of it; on a line of its own."""
    if not content:
        return
    if "://" in os.fspath(path):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + _line_end(before[-1:]) + content)
        return
    with open(path, "a+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        content = _line_end(stream.read(1)) + content
        try:
            if stream.write(content) < len(content):
                raise OSError("there is no space for all of it")
        except OSError:
            stream.truncate(size)
            raise


def _line_end(last: bytes) -> bytes:
    return b"" if last in (b"", b"\n") else b"\n"
