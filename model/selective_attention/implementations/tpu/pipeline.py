"""Software pipelining of a kernel's body.

Steps run from left to right; within a step the chores come first, then units, the newest first:

    step      0        1        2         3         4            5
    chore     select   mask     store                                          F of a square, in time for its weights
    unit 0    scores            weights             accumulate                 delays (0, 2, 4)
    unit 1             scores             weights                accumulate

A stage gets what the stage before it, to its left, made; nothing else passes between them but memory (`ref`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    """Stages that run on one piece of work, stage n at step `steps[n]`; steps may lie before and after all units'."""

    work: Any
    stages: Sequence[Callable[..., Any]]  # stage(work) is the first, stage(work, made) are the others
    steps: Sequence[int]


def software_pipeline(
    units: Sequence[Any], stages: Sequence[Callable[..., Any]], delays: Sequence[int], chores: Sequence[Line] = ()
) -> None:
    """Runs stage n of unit number t at step `t + delays[n]`, amid the chores; delays never fall.

    The compiler schedules bundles more or less in program order. With the stages of one unit behind each other, the
    vector unit waits for the MXU and the MXU for the vector unit; interleaved with other units, both are busy.
    """
    of_units = [Line(unit, stages, [t + delay for delay in delays]) for t, unit in enumerate(units)]
    lines = [*chores, *reversed(of_units)]
    made: dict[int, Any] = {}
    for _, at, n in sorted((step, at, n) for at, line in enumerate(lines) for n, step in enumerate(line.steps)):
        work, line_stages, _ = lines[at]
        made[at] = line_stages[n](work, *([made[at]] if n else []))
