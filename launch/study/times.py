"""What a study's jobs have taken, by the clock and of processor time; several are at work at once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

TIMES_FILE = "times.jsonl"  # within the study's folder: a line for each job that ended, however it did
DATASET = "dataset"  # the name and the kind of what comes before all jobs


class Time(TypedDict):
    """A line of the file."""

    job: str
    kind: str  # what jobs that take about as long share
    began: float  # seconds since 1970
    seconds: float  # by the clock
    processor_seconds: float  # of all its processes
    done: bool


def read_times(workdir: Path) -> list[Time]:
    """All lines of the file that are whole."""
    path = workdir / TIMES_FILE
    found: list[Time] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            time = json.loads(line)
        except ValueError:  # cut off
            continue
        # An earlier version did one job after the other, and did not say when.
        found.append({"began": found[-1]["began"] + found[-1]["seconds"] if found else 0.0} | time)
    return found


def note_time(workdir: Path, time: Time) -> None:
    """Adds a line to the file."""
    rounded = time | {key: round(time[key], 3) for key in ("began", "seconds", "processor_seconds")}
    with (workdir / TIMES_FILE).open("a") as stream:
        stream.write(json.dumps(rounded) + "\n")


def clock_seconds(times: Sequence[Time]) -> float:
    """How long anything was at work: what ran at once counts once, and pauses do not count."""
    total, until = 0.0, 0.0
    for time in sorted(times, key=lambda time: time["began"]):
        end = time["began"] + time["seconds"]
        total += max(0.0, end - max(time["began"], until))
        until = max(until, end)
    return total


def most_at_once(times: Sequence[Time]) -> int:
    """How many jobs were at work at once, at most; one that begins as another ends is not beside it."""
    changes = [(time["began"] + offset, step) for time in times for offset, step in ((0.005, 1), (time["seconds"], -1))]
    most = now = 0
    for _, step in sorted(changes):
        now += step
        most = max(most, now)
    return most


def seconds_left(kinds: Sequence[str], times: Sequence[Time], at_once: int) -> float | None:
    """By the clock, for jobs of these kinds, from what those of each kind took, else from the mean of all; None where
    no job has been done.
    """
    by_kind: dict[str, list[float]] = {}
    for time in times:
        if time["done"] and time["kind"] != DATASET:
            by_kind.setdefault(time["kind"], []).append(time["seconds"])
    everything = [seconds for of_kind in by_kind.values() for seconds in of_kind]
    if not everything:
        return None
    means = {kind: sum(of_kind) / len(of_kind) for kind, of_kind in by_kind.items()}
    return sum(means.get(kind, sum(everything) / len(everything)) for kind in kinds) / at_once
