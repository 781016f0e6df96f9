"""What a workdir's files say of its run, whether it has finished, goes on, or has died: no model, no dataset.

`launch.status` and the page show the same `Run`.
"""

import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from trainer.checkpoints.folder import checkpoint_folder, list_steps
from trainer.goodput import GOODPUT_FILE, read_goodput
from trainer.hosts.lease import LEASE_FOLDER, Lease, Sight
from trainer.loop import RESULT_FILE
from trainer.metrics.json_lines import METRICS_FILE, RunMetrics, Series, read_metrics
from trainer.metrics.steps import perplexity

_OF_A_WORKDIR = (METRICS_FILE, GOODPUT_FILE, RESULT_FILE, LEASE_FOLDER, "checkpoints")


class ReportError(RuntimeError):
    """What cannot be shown; the message says of which run, and what to do."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """The newest evaluation."""

    step: int
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    is_final: bool  # over the whole split, at the end of the run


@dataclasses.dataclass(frozen=True)
class Run:
    """One run."""

    name: str
    workdir: str
    metrics: RunMetrics
    state: str  # "finished", "running", "stopped" or "crashed"
    reason: str  # of the state, for people
    result: Mapping[str, Any] | None
    goodput: Mapping[str, Any] | None  # as `read_goodput`
    trouble: Sequence[str]  # what could not be read

    def series(self, name: str) -> Series:
        """A scalar's points; empty if it was never written."""
        return self.metrics.scalars.get(name, Series())

    def newest(self, name: str) -> float | None:
        """A scalar's last value."""
        values = self.series(name).values
        return values[-1] if values else None

    def median(self, name: str) -> float | None:
        """A scalar's median over the run."""
        values = self.series(name).values
        return statistics.median(values) if values else None

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the config, by its name with dots."""
        return self.metrics.hparams.get(name, default)

    @property
    def step(self) -> int:
        """The newest that is known of."""
        steps = self.series("run/loss").steps
        return self.result["steps"] if self.result else (steps[-1] if steps else 0)

    @property
    def tokens_per_step(self) -> int:
        """0 where the config is not known."""
        return int(self.field("batch_size", 0)) * int(self.field("context_length", 0))

    @property
    def fingerprint(self) -> str:
        """Of the dataset; empty if it is not known."""
        found = re.search(r"fingerprint (\w+)", self.metrics.table("environment").get("dataset", ""))
        return found[1] if found else ""

    @property
    def parameters(self) -> str:
        """How many, as text; empty if that is not known."""
        return self.metrics.table("environment").get("parameters, total", "")

    @property
    def began(self) -> float:
        """When the run was first started, seconds since the epoch."""
        if self.goodput:
            return self.goodput["first_started_at"]
        return self.metrics.begins[0].time if self.metrics.begins else math.nan

    @property
    def validation(self) -> Validation | None:
        """None before the first one."""
        if self.result:
            r = self.result
            return Validation(r["steps"], r["loss"], r["perplexity"], r["bits_per_byte"], is_final=True)
        losses = self.series("run/validation_loss")
        if not losses.steps:
            return None
        bits = self.newest("run/validation_bits_per_byte")
        loss = losses.values[-1]
        return Validation(losses.steps[-1], loss, perplexity(loss), math.nan if bits is None else bits, is_final=False)


def parse_runs(arguments: Sequence[str]) -> dict[str, str]:
    """Workdirs by the names of their runs: of `NAME=WORKDIR` the name, else the folder's, with as much of what is above
    it as tells it from others.

    Raises:
      ReportError: a run or a name is there twice, or half of one is missing.
    """
    given: dict[str, str] = {}  # names by workdirs
    for argument in arguments:
        name, equals, workdir = argument.partition("=")
        if not equals or "/" in name:
            name, workdir = "", argument
        elif not name or not workdir:
            raise ReportError(f"{argument!r} must be WORKDIR, or NAME=WORKDIR")
        workdir = workdir if "://" in workdir else os.path.normpath(workdir)
        if workdir in given:
            raise ReportError(f"{workdir} is given twice; give each run once")
        given[workdir] = name
    folders = {workdir: _folders(workdir) for workdir, name in given.items() if not name}
    runs: dict[str, str] = {}
    for workdir, name in given.items():
        name = name or _shortest(folders[workdir], list(folders.values()))
        if name in runs:
            raise ReportError(f"two runs have the name {name!r}; give one another: NAME={workdir}")
        runs[name] = workdir
    return runs


def _folders(workdir: str) -> list[str]:
    return (workdir if "://" in workdir else os.path.abspath(workdir)).rstrip("/").split("/")


def _shortest(folders: list[str], of_all: Sequence[list[str]]) -> str:
    """As many of the last folders as no other has."""
    for depth in range(1, len(folders)):
        if sum(others[-depth:] == folders[-depth:] for others in of_all) == 1:
            return "/".join(folders[-depth:])
    return "/".join(folders)


def read_run(name: str, workdir: str) -> Run:
    """A run, from its workdir: a path, or a URL such as gs://bucket/run.

    Raises:
      ReportError: it is no workdir, or storage does not give what is in it.
    """
    try:
        return _read_run(name, workdir)
    except ReportError:
        raise
    except OSError as error:
        raise ReportError(f"run {name!r}: {workdir} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        if "://" not in workdir:
            raise
        # Errors of object stores have no base of their own; without its package there is another one.
        raise ReportError(f"run {name!r}: {workdir} cannot be read: {type(error).__name__}: {error}") from error


def _read_run(name: str, workdir: str) -> Run:
    folder = epath.Path(workdir)
    if not any((folder / file).exists() for file in _OF_A_WORKDIR):
        what = f"holds none of {', '.join(_OF_A_WORKDIR)}" if folder.exists() else "is not there"
        raise ReportError(f"run {name!r}: {workdir} is no workdir of `python -m trainer`: it {what}; correct the path")
    trouble, goodput, result = [], None, None
    try:
        goodput = read_goodput(folder / GOODPUT_FILE)
    except ValueError as error:
        trouble.append(f"{GOODPUT_FILE} cannot be read ({error}): where its time went is not known")
    try:
        result = _read_result(folder / RESULT_FILE)
    except (ValueError, KeyError, TypeError) as error:
        trouble.append(f"{RESULT_FILE} cannot be read ({type(error).__name__}: {error}); the trainer computes it again")
    metrics = read_metrics(folder)
    if not metrics.begins:
        trouble.append(f"there is no {METRICS_FILE}, or nothing in it yet: curves and config are not known")
    sight = Lease().look(workdir)
    state, reason = _judge(result is not None, sight, metrics)
    return Run(name, workdir, metrics, state, reason, result, goodput, trouble)


def _read_result(path: epath.Path) -> dict[str, Any] | None:
    """Raises ValueError, KeyError or TypeError if it is something else."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    result["perplexity"] = math.inf if result["perplexity"] is None else float(result["perplexity"])
    return result | {"steps": int(result["steps"]), "loss": float(result["loss"])} | {
        "bits_per_byte": float(result.get("bits_per_byte", math.nan)),  # older trainers left it out
        "tokens": int(result["tokens"]),
    }  # fmt: skip


def _judge(is_finished: bool, sight: Sight | None, metrics: RunMetrics) -> tuple[str, str]:
    """(state, reason)."""
    steps = metrics.scalars.get("run/loss", Series()).steps
    at = f"step {steps[-1]:,}" if steps else "its first step"
    failure = metrics.texts.get("failure")
    if is_finished:
        return "finished", ""
    if sight is not None and sight.is_held:
        return "running", f"{sight.holder}, last sign of life {max(0.0, sight.silent_seconds):.0f} s ago"
    if failure is not None:
        return "crashed", failure.splitlines()[0]
    if sight is None:
        return "stopped", f"nobody trains in it, as far as its files tell; the last is {at}"
    if sight.holder is None:
        return "stopped", f"interrupted and saved at {at}; the same command goes on"
    return "crashed", f"ended without a word after {at}: killed, or its machine or another host was lost; see its log"


def last_checkpoint(workdir: str) -> tuple[int, float] | None:
    """(step, seconds since it was complete) of the newest checkpoint; None if there is none."""
    folder = checkpoint_folder(workdir)
    step = max(list_steps(folder), default=None)
    if step is None:
        return None
    try:
        # By what Orbax wrote: a folder's own time changes when it is copied.
        written = json.loads((folder / str(step) / "_CHECKPOINT_METADATA").read_text())["commit_timestamp_nsecs"]
        return step, max(0.0, time.time() - written / 1e9)
    except (OSError, ValueError, KeyError, TypeError):
        return step, math.nan


def checked_baseline(runs: Sequence[Run], name: str | None) -> Run:
    """The run that others are compared with: the one of this name, else the first without selection, else the first.

    Raises:
      ReportError: no run has the name.
    """
    if name is None:
        return next((run for run in runs if run.field("model.selective") is False), runs[0])
    for run in runs:
        if run.name == name:
            return run
    raise ReportError(f"--baseline={name} is none of the runs: {', '.join(run.name for run in runs)}")
