"""The writers of one run, and what they are told of it once a start: its config, where it runs, by which command."""

import dataclasses
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence

import jax

from configs import base
from trainer.job import Job
from trainer.metrics.json_lines import METRICS_FILE, JsonLinesWriter
from trainer.metrics.tensorboard import TensorBoardWriter
from trainer.metrics.writer import Metrics, MetricsWriter
from trainer.settings import flat

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorboard")


def open_metrics(job: Job, first_step: int, others: Sequence[MetricsWriter] = ()) -> Metrics:
    """The run's writers, on the first host; `others` beside TensorBoard's and the JSON lines'. All know that steps from
    `first_step` on are made now, and what the run is.
    """
    if not job.is_main:
        return Metrics([])
    for writer in others:
        writer.withdraw(first_step)
    tensorboard = TensorBoardWriter(f"{job.workdir}/tensorboard", first_step)
    json_lines = JsonLinesWriter(f"{job.workdir}/{METRICS_FILE}", first_step)
    metrics = Metrics([tensorboard, json_lines, *others])
    config, defaults = (flat(dataclasses.asdict(c)) for c in (job.settings, base.Config()))
    shown = {name: f"{value}" if value == defaults[name] else f"**{value}**" for name, value in config.items()}
    # At `first_step`, not before: a restart from the same checkpoint withdraws these.
    metrics.text(first_step, "config", f"Fields that are not at their defaults are bold.\n\n{_table(shown)}")
    metrics.text(first_step, "environment", _table(environment(job)))
    metrics.text(first_step, "command", f"    {shlex.join(sys.orig_argv)}")
    metrics.hparams(first_step, {name: x for name, x in config.items() if isinstance(x, bool | int | float | str)})
    return metrics


def environment(job: Job) -> dict[str, str]:
    """What the run is computed by, and how large it is."""
    devices = job.mesh.devices
    versions = {name: _version(name) for name in _PACKAGES}
    counts = job.settings.parameter_counts()
    return {
        "Python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "devices": f"{devices.size} x {devices.flat[0].device_kind}, {jax.process_count()} hosts",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in job.mesh.shape.items()),
        "dataset": f"{job.source.name}, fingerprint {job.source.fingerprint}",
        **{f"parameters, {part}": f"{count:,}" for part, count in counts.items()},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
