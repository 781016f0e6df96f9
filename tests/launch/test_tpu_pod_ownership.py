"""Slices that are not the run's: whatever they are called, they are neither used nor deleted."""

import os
import signal

import pytest

from tests.support.cloud import SUBMIT, TRAINER

from .test_tpu_pod_life import created


@pytest.fixture
def left(cloud):
    """A run whose slice was made and is gone, and whose watcher is gone too."""
    cloud.attempts(["WAITING_FOR_RESOURCES"])
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: created(cloud) == 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return cloud


def test_slice_that_a_colleague_made_under_the_name_meanwhile_is_not_set_up(left):
    left.somebody_elses(run="run")
    code, output = left.submit()
    assert code == 2 and "that this run did not make" in output
    assert "run" in left.state()["requests"] and not left.calls("tpu-vm ssh")


@pytest.mark.parametrize("command", ["delete", "stop"])
def test_slice_that_a_colleague_made_with_this_tool_is_neither_stopped_nor_deleted(left, command):
    left.somebody_elses(**{"run": "run", "run-id": "0123456789abcdef"})
    code, output = left.run(command, *(["--yes"] if command == "delete" else []))
    assert code == 2 and "that this run did not make" in output
    assert "run" in left.state()["requests"] and not left.calls("tpu-vm ssh")
    assert not left.calls("queued-resources delete")


def test_run_of_the_same_name_in_another_bucket_is_another_run(left):
    (left.folder / "buckets/other/data/demo").mkdir(parents=True)
    (left.folder / "buckets/other/data/demo/manifest.json").write_text("{}")
    options = [o.replace("gs://bucket", "gs://other") for o in SUBMIT]
    code, output = left.run("submit", "--watch", *options, *TRAINER)
    assert code == 2 and "that this run did not make" in output
    assert created(left) == 1 and "run" in left.state()["requests"]


def test_stop_of_a_request_in_the_queue_deletes_it(left):
    code, output = left.run("stop")
    assert code == 0 and "the request is gone, nothing bills" in output, output
    assert left.state() == {"requests": {}, "created": 1}


def test_stop_without_a_slice_says_that_nothing_bills(left):
    left.change(lambda state: state.update(requests={}))
    code, output = left.run("stop")
    assert code == 0 and "there is no slice, so nothing bills" in output
