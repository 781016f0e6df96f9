"""What is written of each step: to the writers, to goodput, and to the progress bar or, without one, in lines."""

import collections
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from trainer.job import Job
from trainer.metrics.alarms import Alarms
from trainer.metrics.flops import PEAK_FLOPS, mfu
from trainer.metrics.terminal import Progress
from trainer.metrics.thinning import Thinned, is_kept
from trainer.metrics.writer import MetricsWriter
from trainer.outcomes import NORMS_EVERY, Outcome

logger = logging.getLogger("trainer")
_RECENT = 100  # steps that speeds are taken over
_SPEEDS_EVERY = 10  # steps


class StepLog:
    """Of one process; all hosts count goodput and watch their own time, the first one writes."""

    def __init__(self, job: Job, writer: MetricsWriter, bar: tqdm, last_save: Callable[[], float]) -> None:
        """`last_save`: when the newest checkpoint was made, seconds of the monotonic clock."""
        self._job, self._goodput, self._writer = job, job.phases.goodput, writer
        self._thinned = Thinned(writer)
        self._alarms = Alarms(writer)
        self._progress = Progress(bar, job.settings.log_every_steps, last_save)
        self._recent: collections.deque[Outcome] = collections.deque(maxlen=_RECENT)
        self._speeds: dict[str, float] = {}  # the newest
        self._is_first = True
        settings = job.settings
        self._tokens = settings.batch_size * settings.context_length  # of a step

    def write(self, outcome: Outcome) -> None:
        """To be called once for each step, in order."""
        step, metrics = outcome.step, outcome.metrics
        waited = min(outcome.seconds, outcome.wait_seconds)
        self._goodput.add("data", waited)
        self._goodput.step(step, outcome.seconds - waited, metrics["loss"])
        self._recent.append(outcome)
        is_check = is_kept(step, _RECENT)
        if is_check:
            self._alarms.tell_own_time(self._mean("own_seconds"))
        if not self._job.is_main:
            return
        trouble = self._alarms.after_step(step, metrics)
        self._thinned.write(step, self._of_step(step, metrics), trouble)
        is_speed = is_kept(step, _SPEEDS_EVERY) or trouble
        if is_speed or is_check or self._is_first or step % self._job.settings.log_every_steps == 0:
            self._speeds = self._measure_speeds()
        if is_speed:
            self._writer.write(step, self._speeds | {"run/goodput": self._goodput.fraction()})
        if outcome.norms is not None:
            self._writer.write(step, norm_scalars(outcome.norms))
        if self._is_first or is_kept(step, NORMS_EVERY):
            self._writer.write(step, self._of_system())
        if self._is_first:
            self._is_first = False
            logger.info("first step done %.1f s after the process began", time.monotonic() - self._job.started_at)
        if is_check:
            self._alarms.look(step, self._mean("wait_seconds"), self._mean("seconds"), self._goodput)
        self._progress.show(step, metrics["loss"], self._speeds)

    def forget(self) -> None:
        """After a rollback: what was not written yet is history."""
        self._thinned.forget()

    def explain(self, step: int, error: BaseException) -> None:
        """The run fails at this step: writes why, and all that is known of its last steps."""
        self._thinned.explain()
        self._writer.text(step, "failure", f"{type(error).__name__}: {error}")
        self._writer.flush()

    def _of_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        loss = metrics["loss"]
        scalars = {
            "run/loss": loss,
            "run/perplexity": perplexity(loss),
            "run/learning_rate": metrics["learning_rate"],
            "run/tokens": float(step * self._tokens),
            "weights/gradient_norm": metrics["grad_norm"],
            "weights/skipped_updates_in_a_row": metrics["bad_steps"],
        }
        if metrics["bytes"]:
            scalars["run/bits_per_byte"] = loss * metrics["tokens"] / (math.log(2) * metrics["bytes"])
        if self._job.settings.memory_loss.epsilon:
            scalars["selection/training_memory_loss"] = metrics["memory_loss"]
        return scalars

    def _measure_speeds(self) -> dict[str, float]:
        seconds = [outcome.seconds for outcome in self._recent]
        scalars = {
            "run/tokens_per_second": self._tokens / self._mean("seconds"),
            "run/step_seconds_median": float(np.median(seconds)),
            "run/step_seconds_p99": float(np.percentile(seconds, 99)),
            "system/data_wait_seconds": self._mean("wait_seconds"),
            "system/data_loading_seconds": self._mean("loading_seconds"),
        }
        mesh = self._job.mesh
        kind = mesh.devices.flat[0].device_kind
        if kind in PEAK_FLOPS:
            scalars["run/mfu"] = mfu(self._job.settings, self._mean("seconds"), mesh.size, kind)
        return scalars

    def _of_system(self) -> dict[str, float]:
        scalars = {"system/hosts": float(jax.process_count()), "system/restarts": float(self._goodput.starts - 1)}
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in self._job.mesh.local_devices]
        return scalars | ({"system/device_memory_peak_bytes": float(max(peaks))} if any(peaks) else {})

    def _mean(self, field: str) -> float:
        return sum(getattr(outcome, field) for outcome in self._recent) / len(self._recent)


def norm_scalars(norms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Scalars of a step's `norms`: of the gradient, and perhaps of the update and the parameters, with their ratio."""
    groups = {f"weights_{name}_norm": by_kind for name, by_kind in norms.items()}
    if "parameter" in norms:
        groups["weights_update_ratio"] = {
            kind: np.divide(norms["update"][kind], np.maximum(norm, np.finfo(np.float32).tiny))
            for kind, norm in norms["parameter"].items()
        }
    scalars: dict[str, float] = {}
    for group, by_kind in groups.items():
        for kind, value in by_kind.items():
            if np.ndim(value):
                scalars |= {f"{group}/layer_{n:02d}_{kind}": float(x) for n, x in enumerate(value)}
            else:
                scalars[f"{group}/{kind}"] = float(value)
    return scalars


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
