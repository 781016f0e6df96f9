"""What hides a collective: the work that the program's schedule puts beside it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch.plan.collectives import Network
from launch.plan.hlo import Program
from launch.plan.times import Times, step_times
from launch.slices import find

GATHER = "f32[2000000]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}"
GATHER_MS = 1e3 * 3 / 4 * 8e6 / (2 * 50e9)  # over two open sides


def times(*lines: str) -> Times:
    """Of a program for four chips of v4 that runs these lines; `WORK` takes a hundredth of a millisecond."""
    work = 'f32[8]{0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"10500"}'
    text = "\n".join(f"  %{line}".replace("WORK", work) for line in ("p = f32[500000]{0} parameter(0)", *lines))
    devices = np.array([SimpleNamespace(coords=c) for c in np.ndindex(2, 2, 1)])
    program = Program(f"HloModule m\n\nENTRY %main (p: f32[500000]) -> f32[8] {{\n{text}\n}}\n")
    return step_times(program, list(program.operations()), Network({"data": 4}, devices, find("v4-8"), 1), Path())


def start(name: str) -> str:
    return f"{name} = (f32[500000]{{0}}, {GATHER}"


def end(name: str) -> str:
    return f"{name}-end = f32[2000000]{{0}} all-gather-done(%{name})"


def test_work_between_its_start_and_its_end_hides_a_collective():
    made = times("w = WORK", start("a"), "x = WORK", "y = WORK", end("a"), "z = WORK")
    assert made.milliseconds["optimizer"] == pytest.approx(4 * 0.01)  # work that no gradient was traced from
    assert made.hidden == pytest.approx(2 * 0.01)
    assert made.milliseconds["collectives"] == pytest.approx(GATHER_MS - 2 * 0.01)


def test_no_more_is_hidden_than_there_is():
    made = times(start("a"), *(f"w{n} = WORK" for n in range(10)), end("a"))
    assert made.milliseconds["collectives"] == pytest.approx(0)
    assert made.hidden == pytest.approx(GATHER_MS)


def test_the_same_work_hides_only_one_of_two_that_are_under_way():
    made = times(start("a"), start("b"), "w = WORK", end("a"), end("b"))
    assert made.hidden == pytest.approx(0.01)


def test_a_synchronous_collective_is_waited_for():
    line = "r = f32[500000]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add"
    made = times("w = WORK", line, "x = WORK")
    assert made.hidden == pytest.approx(0)
    assert made.milliseconds["collectives"] == pytest.approx(1e3 * 2 * 3 / 4 * 2e6 / (2 * 50e9))
