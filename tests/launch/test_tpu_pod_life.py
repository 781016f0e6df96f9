"""A run's life on the fake cloud: whatever happens, one slice at a time, and none is left."""

import os
import re
import signal

import pytest

from tests.support.cloud import SUBMIT, TRAINER, replaced

QUEUED = ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
QUOTA = "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
QUOTA += "'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' has been exceeded. Limit: {} in region us-central2."
RATE = "ERROR: (gcloud) HttpError accessing <https://tpu.googleapis.com>: response: <'status': 429>, content <Quota "
RATE += "exceeded for quota metric 'Requests'>\nThis may be due to network connectivity issues."
NETWORK = "ERROR: gcloud crashed (ConnectionError): Connection aborted."


def created(cloud) -> int:
    return cloud.state()["created"]


def test_submitted_run_is_set_up_trained_and_its_slice_deleted(cloud):
    cloud.attempts(QUEUED)
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0, output + cloud.host_logs()
    assert cloud.state() == {"requests": {}, "created": 1}
    assert "step 1 loss 2.5" in output
    watchdog = cloud.folder / "local/tpu_pod/runs/run/watchdog.sh"
    label = re.search("RUN_ID=([0-9a-f]{16})\n", cloud.object("run"))[1]
    assert cloud.calls("queued-resources create")[0][4:] == [
        "run", "--project=my-project", "--zone=us-central2-b", "--accelerator-type=v4-16",
        "--runtime-version=tpu-ubuntu2204-base", f"--labels=run=run,run-id={label}", "--node-id=run", "--spot",
        "--valid-until-duration=24h", f"--metadata-from-file=startup-script={watchdog}", "--quiet",
    ]  # fmt: skip


@pytest.mark.slow
def test_reclaimed_while_provisioning_and_while_active_it_is_made_again(cloud):
    reclaimed = ["PROVISIONING", "SUSPENDING", "FAILED 13 an internal error has occurred"]
    cloud.attempts(reclaimed, QUEUED)
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.change(lambda state: state["requests"]["run"].update(states=["SUSPENDING", "SUSPENDED"]))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert cloud.state() == {"requests": {}, "created": 3}


@pytest.mark.slow
def test_out_of_memory_is_named_and_ends_the_billing(cloud):
    cloud.trainer("3 error: the step does not fit")
    code, output = cloud.submit()
    assert code == 1 and "out of memory: the model does not fit" in output
    assert cloud.state() == {"requests": {}, "created": 1}
    assert len((cloud.folder / "starts-0").read_text().splitlines()) == 1


@pytest.mark.slow
def test_crashes_are_restarted_up_to_a_limit(cloud):
    cloud.trainer(*["1 ValueError: broken"] * 9)
    code, output = cloud.submit()
    assert code == 1 and "crashed again and again" in output
    assert cloud.state()["requests"] == {}
    assert len((cloud.folder / "starts-0").read_text().splitlines()) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_interrupted_watcher_is_continued_by_the_same_submit(cloud, number):
    cloud.attempts(QUEUED)
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert number == signal.SIGKILL or "BILL" in output
    cloud.wait_for(lambda: (cloud.folder / "starts-0").exists())
    cloud.host_signal(0, signal.SIGTERM)
    code, output = cloud.submit()
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [pytest.param("submitted", marks=SLOW), "attempt", pytest.param("ready", marks=SLOW)]
)
def test_watcher_killed_at_any_moment_leaves_nothing_that_is_made_twice(cloud, moment):
    cloud.attempts(QUEUED)
    cloud.trainer("0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: moment in cloud.object("events"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = cloud.submit()
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_network_errors_of_every_call_are_outlived(cloud):
    cloud.trainer("0")
    calls = ["runs/run/events", "objects describe", "tpu-vm describe", "tpu-vm ssh", "queued-resources delete run "]
    for call in [*calls, "queued-resources describe", "host-*.status", "storage cat"]:
        cloud.error(call, NETWORK)
    code, output = cloud.submit()
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}
    assert [error["times"] for error in cloud.script_now()["errors"]] == [0] * 8


@pytest.mark.parametrize("after", [False, True])
def test_network_error_while_creating_makes_no_second_slice(cloud, after):
    cloud.error("queued-resources create", NETWORK, after=after)
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0, output
    assert created(cloud) == 1


@pytest.mark.slow
def test_rate_limit_is_waited_out(cloud):
    cloud.error("queued-resources create", RATE)
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0, output
    assert created(cloud) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "words"), [(0, "no quota at all"), (32, "ask for more quota")])
def test_quota_error_says_what_to_do_and_submit_goes_on_later(cloud, limit, words):
    cloud.error("queued-resources create", QUOTA.format(limit))
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 1 and words in output
    assert cloud.state() == {"requests": {}, "created": 0}
    code, output = cloud.submit()
    assert code == 0, output
    assert created(cloud) == 1


@pytest.mark.slow
def test_failing_describe_is_not_taken_for_absent(cloud):
    cloud.error("queued-resources describe", NETWORK, times=12)
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0, output
    assert created(cloud) == 1


def test_slice_of_somebody_else_is_left_alone(cloud):
    cloud.change(lambda s: s["requests"].update(run={"states": ["ACTIVE"], "hosts": 2, "port": 1, "nodes": {}}))
    code, output = cloud.submit()
    assert code == 2 and "that this run did not make" in output
    assert "run" in cloud.state()["requests"]


def test_delete_ends_the_watcher_and_the_slice(cloud):
    cloud.attempts(["WAITING_FOR_RESOURCES"])
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: created(cloud) == 1)
    code, output = cloud.run("delete", "--yes")
    assert code == 0 and cloud.state() == {"requests": {}, "created": 1}, output
    output, _ = process.communicate(timeout=120)
    assert "this watcher ends: deleted" in output
    assert created(cloud) == 1


def test_environment_is_recorded_and_reaches_the_trainer_of_every_host(cloud):
    cloud.script["secrets"] = {"projects/my-project/secrets/wandb/versions/3": "very secret"}
    cloud.host()
    cloud.trainer("0", "0")
    code, output = cloud.submit("--env", "NOTE=a b", "--secret", "TOKEN=wandb:3")
    assert code == 0 and "very secret" not in output, output
    for host in (0, 1):
        lines = (cloud.folder / f"environment-{host}").read_text().splitlines()
        assert {"NOTE=a b", "TOKEN=very secret"} <= set(lines)
    secret = "secret TOKEN=projects/my-project/secrets/wandb/versions/3"
    assert cloud.object("trainer.args") == f"--config=configs/demo.py\nenv NOTE=a b\n{secret}\n"
    # Another value is other flags: what was finished with the first is not taken for it.
    code, output = cloud.submit("--env", "NOTE=c", "--secret", "TOKEN=wandb:3")
    assert code == 0 and "finished already" not in output
    assert "NOTE=c" in (cloud.folder / "environment-0").read_text().splitlines()


def test_hosts_install_the_version_of_gcsfuse_that_is_pinned_whatever_they_have(cloud):
    cloud.trainer("0")
    cloud.host(FAKE_GCSFUSE="2.0.0")
    code, output = cloud.run("submit", *replaced("--type", "v4-8"), *TRAINER)
    assert code == 0, output
    assert "install -y --allow-downgrades gcsfuse=3.11.2\n" in (cloud.folder / "apt-get-0").read_text()
