"""That nothing bills is said, and another slice made, only where the run's slice is surely gone, wherever that is."""

import os
import signal

import pytest

from tests.support.cloud import SUBMIT, TRAINER, replaced

from .test_tpu_pod_life import created


@pytest.fixture
def asked(cloud):
    """A run whose watcher was killed right after it had asked for a slice, which the service does not find yet."""
    cloud.attempts(["WAITING_FOR_RESOURCES"])
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: created(cloud) == 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cloud.change(lambda state: state["requests"]["run"].update(hidden=3))
    return cloud


@pytest.mark.parametrize("command", [["delete", "--yes"], pytest.param(["stop"], marks=pytest.mark.slow)])
def test_request_that_is_not_found_yet_is_deleted_all_the_same(asked, command):
    code, output = asked.run(*command)
    assert code == 0 and "nothing bills" in output, output
    assert asked.state() == {"requests": {}, "created": 1}


def test_run_does_not_move_while_its_request_may_not_be_found_yet(asked):
    code, output = asked.run("submit", "--watch", *replaced("--zone", "europe-west4-a"), *TRAINER)
    assert code == 2 and "run run has a slice (WAITING_FOR_RESOURCES) with ZONE=us-central2-b" in output, output
    assert created(asked) == 1


@pytest.mark.parametrize("command", [["delete", "--yes"], pytest.param(["stop"], marks=pytest.mark.slow)])
def test_slice_that_a_watcher_elsewhere_has_in_another_zone_is_deleted_there(asked, command):
    asked.change(lambda state: state["requests"]["run"].update(hidden=0, zone="europe-west4-a"))
    asked.put("run", asked.object("run").replace("ZONE=us-central2-b", "ZONE=europe-west4-a"))
    code, output = asked.run(*command)
    assert code == 0 and "nothing bills" in output, output
    assert asked.state() == {"requests": {}, "created": 1}


def test_record_that_names_another_run_is_not_followed(asked):
    asked.somebody_elses("victim", **{"run-id": "0123456789abcdef"})
    theirs = asked.object("run").replace("NAME=run\n", "NAME=victim\n")
    label = next(line for line in theirs.splitlines() if line.startswith("RUN_ID="))
    asked.put("run", theirs.replace(label, "RUN_ID=0123456789abcdef"))
    code, output = asked.run("delete", "--yes")
    assert code == 2 and "is of another run" in output
    assert "victim" in asked.state()["requests"]


def test_slice_of_somebody_else_is_not_entered_and_not_shown_as_the_runs(asked):
    asked.somebody_elses(**{"run-id": "0123456789abcdef"})
    code, output = asked.run("ssh")
    assert code == 2 and "that this run did not make" in output
    assert not asked.calls("tpu-vm ssh")
    assert "slice     ACTIVE, of somebody else" in asked.run("status")[1]
