"""A phase is watched while it lasts and its seconds are counted, however it ends."""

import subprocess
import sys

import pytest

from trainer.errors import EXIT_PEER_LOST

PROGRAM = """
import contextlib, sys, time
from trainer.goodput import Goodput, Phases
from trainer.hosts.watchdog import Watchdog
goodput = Goodput(sys.argv[1], time.monotonic(), is_main=True)
phases = Phases(Watchdog(least_seconds=2, factor=1, first_seconds=2), goodput)
"""


def run(tmp_path, program: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, tmp_path], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_an_exception_ends_the_watch_and_its_time_has_its_cause(tmp_path):
    program = """
with contextlib.suppress(OSError), phases("saving a checkpoint", "saving"):
    time.sleep(0.5)
    raise OSError
time.sleep(3)
print(goodput.seconds()["saving"])
"""
    code, output = run(tmp_path, program)
    assert code == 0, output
    assert 0.5 <= float(output) < 2


@pytest.mark.slow
def test_a_phase_that_is_renewed_may_last_longer_than_its_limit(tmp_path):
    program = """
with phases("an evaluation batch", "evaluation") as next_batch:
    for _ in range(5):
        time.sleep(0.8)
        next_batch()
print(goodput.seconds()["evaluation"])
"""
    code, output = run(tmp_path, program)
    assert code == 0, output
    assert float(output) >= 4


@pytest.mark.parametrize("inner", ["pass", "raise OSError"])
def test_the_phase_around_another_is_watched_again_when_that_has_ended(tmp_path, inner):
    program = f"""
with phases("rolling back", "restore"):
    with contextlib.suppress(OSError), phases("a training step"):
        {inner}
    time.sleep(60)
"""
    code, output = run(tmp_path, program)
    assert code == EXIT_PEER_LOST
    assert "rolling back has taken" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "phase"), [("a_compiler_that_hangs", "waiting for the compiler"), ("a_close_that_hangs", "closing")]
)
def test_a_run_that_hangs_outside_of_its_steps_is_ended_by_the_watchdog(start_process, finish, tmp_path, fault, phase):
    limits = {"faults__first_step_timeout_seconds": 20.0, "faults__step_timeout_seconds": 20.0}
    code, output = finish(start_process(["tests.support.faulty_trainer", fault], tmp_path, steps=2, **limits))
    assert code == EXIT_PEER_LOST, output
    assert f"{phase} has taken" in output
