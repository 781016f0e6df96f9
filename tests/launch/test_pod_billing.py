"""The table of what bills when, against the rules of the slice itself and the state machine."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.pod import billing
from launch.pod.record import duration
from launch.pod.state import ABSENT, DEAD, DEFAULT_VALID, QUEUED
from tests.support import ROOT

from .test_pod_decide import LIMITS, STORY, told

VALID = duration(DEFAULT_VALID)


def test_table_of_the_readme_is_this_one():
    assert billing.table() in (ROOT / "docs/tpu.md").read_text()


def test_times_are_those_of_the_scripts():
    watchdog, worker = ((ROOT / "launch" / name).read_text() for name in ("pod/watchdog.sh", "worker.sh"))
    seconds = {key: float(value) for key, value in re.findall(r"(\w+_SECONDS):-(\d+)", watchdog + worker)}
    assert seconds["WATCHDOG_IDLE_SECONDS"] == billing.IDLE and seconds["WORKER_IDLE_SECONDS"] == billing.ENDED
    assert seconds["WATCHDOG_LOOK_SECONDS"] + seconds["WATCHDOG_SAVE_SECONDS"] + 120 + 600 == billing.LOOK


@pytest.mark.parametrize("row", billing.ROWS, ids=lambda row: row.happens)
def test_answer_says_what_the_rules_say(row):
    longest = billing.longest(row, 720)
    if row.watched or row.request in DEAD:
        assert longest == 0 and row.answer.startswith("no")
    elif row.at_work:
        assert longest > 700 * 3600 and row.answer.startswith("**yes**")
    else:
        assert longest <= billing.IDLE + billing.LOOK and re.search("1 hour|30 minutes", row.answer)


def left_alone(request: str, at_work: bool, up: float, granted_after: float, ends_after: float) -> tuple[float, float]:
    """A request to which nobody looks, minute by minute: what the service and the watchdog on the slice do.

    Returns:
      For how many seconds it billed and lasted.
    """
    now, idle, billed = 0.0, 0.0, 0.0
    while True:
        if request in QUEUED and now >= granted_after:
            request = "ACTIVE"
        if request in DEAD or (request in QUEUED and now >= VALID):
            return billed, now
        if request not in QUEUED:
            at_work = at_work and now < ends_after
            idle = 0.0 if at_work else idle + 60.0
            if idle >= billing.IDLE or up + billed >= LIMITS.max_hours * 3600.0:
                return billed + 60.0, now + 60.0
            billed += 60.0
        now += 60.0


@settings(max_examples=300, derandomize=True, deadline=None)
@given(STORY, st.booleans(), st.floats(0, VALID - 60), st.floats(0, 1e6))
def test_whatever_has_happened_nothing_bills_for_long_when_nobody_ever_looks_again(story, at_work, granted, ends):
    world = told(story)
    if world.request is None or not world.ours:
        return
    at_work = at_work and world.request == "ACTIVE"
    left = max(0.0, LIMITS.max_hours * 3600.0 - world.up)
    bills, lasts = billing.unattended(world.request, at_work, left, VALID)
    billed, lasted = left_alone(world.request, at_work, world.up, granted, ends)
    assert billed <= bills and lasted <= lasts
    assert bills <= LIMITS.max_hours * 3600.0 + billing.ENDED + billing.LOOK
    assert billing.unattended(ABSENT, False, left, VALID) == (0, 0)
