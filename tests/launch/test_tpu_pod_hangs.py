"""Calls that never end: none holds the watcher, and none keeps a slice."""

import shutil

import pytest

from tests.support.cloud import SUBMIT, TRAINER

from .test_tpu_pod_life import created


@pytest.mark.slow
def test_hanging_set_up_is_ended_and_tried_again(cloud):
    cloud.trainer("0")
    cloud.hang("host.sh setup")
    cloud.environment["TPU_POD_SETUP_SECONDS"] = "4"
    code, output = cloud.submit()
    assert code == 0 and "gcloud did not answer within 4 s" in output, output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_slice_that_is_preempted_while_its_set_up_hangs_is_replaced(cloud):
    cloud.trainer("0")
    cloud.hang("host.sh setup")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: cloud.script_now()["errors"][0]["times"] == 0)
    cloud.preempt()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert cloud.state() == {"requests": {}, "created": 2}
    assert cloud.launcher_processes() == []


def test_hours_that_run_out_while_set_up_hangs_end_the_billing(cloud):
    cloud.hang("host.sh setup", times=9)
    cloud.put("events", "1000\tattempt\t1\n2000\tready\t\n5598\tgone\t\n")
    cloud.environment |= {"TPU_POD_STOP_SECONDS": "2", "TPU_POD_POLL_SECONDS": "0.5"}
    code, output = cloud.submit("--max-hours", "1")
    assert code == 1 and "slices were up for 1 hours in all" in output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_delete_does_not_wait_for_hosts_that_hang(cloud):
    cloud.trainer("-")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.hang("host.sh stop", times=2)
    code, output = cloud.run("delete", "--yes", TPU_POD_STOP_SECONDS="2")
    assert code == 0 and "the slice is gone, nothing bills" in output
    process.communicate(timeout=60)
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_hanging_look_is_no_look(cloud):
    cloud.trainer("0")
    cloud.hang("queued-resources describe")
    cloud.environment["TPU_POD_CALL_SECONDS"] = "5"
    code, output = cloud.submit()
    assert code == 0, output
    assert created(cloud) == 1


@pytest.mark.slow
def test_request_whose_creation_hangs_after_it_was_taken_is_found(cloud):
    cloud.trainer("0")
    cloud.hang("queued-resources create", after=True)
    cloud.environment["TPU_POD_CREATE_SECONDS"] = "3"
    code, output = cloud.submit()
    assert code == 0 and "gcloud did not answer within 3 s" in output, output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_first_ssh_of_a_laptop_makes_the_key_before_the_others_go(cloud):
    cloud.trainer("0")
    shutil.rmtree(cloud.folder / "home/.ssh")
    code, output = cloud.submit("--slices", "2")
    assert code == 0 and "setup failed" not in output, output
