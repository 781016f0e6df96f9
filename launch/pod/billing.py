"""What bills when nobody looks: the rules by which a slice ends itself, and the table of docs/tpu.md.

python3 -m launch.pod.billing    # prints the table
"""

import dataclasses

from .record import duration
from .state import ABSENT, DEAD, DEFAULT_VALID, QUEUED

# Seconds, as in watchdog.sh and worker.sh.
IDLE = 3600.0  # without a trainer at work, until the watchdog deletes the slice
ENDED = 1800.0  # after the run's end, until the worker does
LOOK = 60.0 + 240.0 + 720.0  # between two looks, for a save, for the calls


def unattended(request: str, at_work: bool, seconds_left: float, valid: float) -> tuple[float, float]:
    """How long a request of the run bills and how long it lasts at most, if no watcher ever looks at it again.

    Args:
      request: its state.
      at_work: a trainer is.
      seconds_left: that slices may be up still, by --max-hours.
      valid: seconds within which it may be granted.

    Returns:
      Seconds. They hold if the slice's service account may delete it (the role TPU Admin).
    """
    if request == ABSENT or request in DEAD:
        return 0.0, 0.0
    up = (min(seconds_left, IDLE) if not at_work else seconds_left + ENDED) + LOOK
    return up, up + (valid if request in QUEUED else 0.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """What happens, the request that it leaves behind, and whether a watcher looks after that."""

    happens: str
    request: str
    at_work: bool
    watched: bool
    answer: str


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.0f} hour{'s' if seconds != 3600 else ''}"


ROWS = (
    Row("the run finishes or fails for good, watched", ABSENT, False, True,
        "no: the watcher deletes the slice and looks until it is gone"),
    Row("the same, with no watcher", "ACTIVE", False, False,
        f"for {ENDED / 60:.0f} minutes, then the slice deletes itself"),
    Row("preempted, watched", ABSENT, False, True,
        "no; the watcher makes a new slice, up to `--max-attempts` of them"),
    Row("preempted, with no watcher", "SUSPENDED", False, False, "no; the request holds quota until it is deleted"),
    Row("slices were up for `--max-hours` in all", ABSENT, False, True,
        "no: saved and deleted, by the watcher or by the slice itself"),
    Row("Ctrl-C, or the watcher dies, while a trainer is at work", "ACTIVE", True, False,
        "**yes**, until the run ends or its `--max-hours` are used up. Submit again, or `delete`"),
    Row("the same, before the slice is set up", "ACTIVE", False, False,
        f"for {_hours(IDLE)}, then the slice deletes itself"),
    Row("the same, while the request is queued", "WAITING_FOR_RESOURCES", False, False,
        f"if it is granted within `--valid-until` ({DEFAULT_VALID}), for {_hours(IDLE)}"),
    Row("`stop` of a slice", "ACTIVE", False, False,
        f"**yes**, for {_hours(IDLE)}: kept for the next submit, then the slice deletes itself"),
    Row("`stop` of a queued request", ABSENT, False, True, "no: the request is deleted"),
    Row("`delete`", ABSENT, False, True,
        "no: it returns when the slice is gone, and says so in capitals if it could not make sure"),
)  # fmt: skip


def table() -> str:
    lines = ["| what happens | does it bill afterwards? |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row.happens} | {row.answer} |" for row in ROWS)])


def longest(row: Row, max_hours: int) -> float:
    """Seconds that a row's request bills at most."""
    return unattended(row.request, row.at_work, max_hours * 3600.0, duration(DEFAULT_VALID))[0]


if __name__ == "__main__":
    print(table())
