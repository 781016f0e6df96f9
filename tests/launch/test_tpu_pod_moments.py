"""What comes at the worst moment: between a look and what is done after it, and while calls hang one after another."""

import signal

import pytest

from launch.pod import lock
from launch.pod.gcloud import Gcloud
from tests.support.cloud import SUBMIT, TRAINER

from .test_tpu_pod_life import created


def test_watcher_that_lost_the_run_after_its_look_asks_for_no_slice(cloud):
    cloud.hold("runs/run/events", skip=2)  # the attempt, which is written between the look and the request
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(cloud.held)
    cloud.put("watch", "watched office 4711 1700000000 01234567\n")
    cloud.release()
    output, _ = process.communicate(timeout=60)
    assert "attempt 1" in output and "this watcher ends: watched office 4711" in output, output
    assert created(cloud) == 0


def test_slice_that_a_colleague_made_after_the_look_is_not_deleted(cloud):
    cloud.attempts(["FAILED 8 There is no more capacity in the zone"])
    cloud.hold("/events gs://", skip=2)  # what is written between the look that found it failed and the delete
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(cloud.held)
    cloud.somebody_elses(**{"run-id": "0123456789abcdef"})
    cloud.release()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "that this run did not make" in output, output
    assert "run" in cloud.state()["requests"] and not cloud.calls("queued-resources delete")


def test_delete_between_the_reading_and_the_taking_of_the_lock_keeps_it(cloud, monkeypatch):
    monkeypatch.setenv("PATH", cloud.environment["PATH"])
    for name in ("FAKE_CLOUD", "FAKE_PYTHON", "HOME"):
        monkeypatch.setenv(name, cloud.environment[name])
    gcloud, url = Gcloud(), "gs://bucket/runs/run"
    cloud.put("watch", "finished 01234567\n")
    submit, delete = lock.Lock(gcloud, url, "run"), lock.Lock(gcloud, url, "run")
    generation = submit._generation()
    delete.seize("deleted by me")
    assert not submit._write("watched here", generation)
    assert cloud.object("watch").startswith("deleted by me ")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["delete", "--yes"], ["stop"]])
def test_interrupted_end_of_the_billing_does_not_go_silently(cloud, command):
    cloud.trainer("-")
    watcher = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.hold("host.sh stop")
    process = cloud.start(*command)
    cloud.wait_for(cloud.held)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    watcher.communicate(timeout=60)
    assert process.returncode == 130 and "The slice MAY STILL BILL" in output, output
    assert "run" in cloud.state()["requests"]


def test_interrupted_watcher_ends_although_set_up_hangs(cloud):
    cloud.hang("host.sh setup", times=2)
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: cloud.script_now()["errors"][0]["times"] == 0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "BILL if the slice is up" in output, output
    assert cloud.launcher_processes() == []


@pytest.mark.slow
def test_delete_does_not_wait_for_a_bucket_that_takes_nothing(cloud):
    cloud.trainer("-")
    watcher = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=60)
    cloud.hang("/events gs://", times=99)
    before = len(cloud.calls("/events gs://"))
    code, output = cloud.run("delete", "--yes", TPU_POD_CALL_SECONDS="3")
    assert code == 0 and "the slice is gone, nothing bills" in output, output
    assert cloud.state()["requests"] == {}
    assert len(cloud.calls("/events gs://")) - before == 2  # gone, deleted: each tried once
