"""What went wrong in a run, or made it slow: its warnings, as the trainer wrote them, joined to episodes."""

import dataclasses
from collections.abc import Callable, Sequence

from launch.report.run import Run

_PREFIX = "warning/"
_APART = 200  # steps between points of one episode at most, at first
_DENSE_STEPS = 13  # binary digits: beyond, points become ever rarer, as `trainer.metrics.thinning` says
_WORDS: dict[str, Callable[[Sequence[float]], str]] = {
    "loss_spike_z": lambda v: f"loss spike, {max(v):.1f} deviations above its mean",
    "skipped_updates": lambda v: f"{len(v)} update{'s' if len(v) > 1 else ''} skipped: loss or gradient was bad",
    "data_bound": lambda v: f"waited for data, up to {max(v):.0%} of a step",
    "low_goodput": lambda v: f"goodput was down to {min(v):.0%}",
    "slow_host": lambda v: f"host {v[-1]:.0f} was slow",
}


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One episode of one kind; a rollback is one too."""

    first_step: int
    last_step: int
    says: str

    @property
    def steps(self) -> str:
        """Such as "step 7" or "steps 7 to 9"."""
        if self.first_step == self.last_step:
            return f"step {self.first_step:,}"
        return f"steps {self.first_step:,} to {self.last_step:,}"


def alarms(run: Run) -> list[Alarm]:
    """All of a run, in the order of their steps. Those of steps that were withdrawn are withdrawn too."""
    found = []
    for name, series in run.metrics.scalars.items():
        if not name.startswith(_PREFIX):
            continue
        kind, first = name.removeprefix(_PREFIX), 0
        for i, step in enumerate(series.steps):
            is_last = i + 1 == len(series.steps)
            if is_last or series.steps[i + 1] - step > _APART << max(0, step.bit_length() - _DENSE_STEPS):
                found.append(Alarm(series.steps[first], step, _say(kind, series.values[first : i + 1])))
                first = i + 1
    for begin in run.metrics.begins:
        if begin.is_rollback:
            found.append(Alarm(begin.first_step, begin.first_step, "rolled back, after too many bad updates in a row"))
    return sorted(found, key=lambda alarm: (alarm.first_step, alarm.last_step))


def _say(kind: str, values: Sequence[float]) -> str:
    if kind in _WORDS:
        return _WORDS[kind](values)
    return f"{kind.replace('_', ' ')}: {values[-1]:g}"
