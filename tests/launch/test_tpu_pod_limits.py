"""What ends a run that does not finish, and who may go on with it: limits, other watchers, several slices."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.support.cloud import SUBMIT, TRAINER, replaced

from .test_tpu_pod_life import created

RECLAIMED = ["PROVISIONING", "SUSPENDING", "FAILED 13 an internal error has occurred"]


@pytest.mark.slow
def test_attempts_are_made_up_to_the_maximum(cloud):
    cloud.attempts(RECLAIMED)
    code, output = cloud.submit("--max-attempts", "2")
    assert code == 1 and "2 attempts are used up; submit again with a higher --max-attempts" in output
    assert cloud.state() == {"requests": {}, "created": 2}


def up_for(cloud, seconds: int) -> None:
    """A history in which a slice was up for so long, until a minute ago."""
    end = int(time.time()) - 60
    cloud.put("events", f"{end - seconds - 9}\tattempt\t1\n{end - seconds}\tready\t\n{end}\tgone\t\n")


def test_hours_that_are_used_up_end_a_run_before_another_slice_is_asked_for(cloud):
    up_for(cloud, 3600)
    code, output = cloud.submit("--max-hours", "1")
    assert code == 1 and "slices were up for 1 hours in all; submit again with a higher --max-hours" in output
    assert cloud.state() == {"requests": {}, "created": 0}


@pytest.mark.slow
def test_hours_that_run_out_while_training_save_and_end_the_billing(cloud):
    up_for(cloud, 3580)
    cloud.trainer("-")
    cloud.environment["TPU_POD_POLL_SECONDS"] = "1"
    code, output = cloud.submit("--max-hours", "1")
    assert code == 1 and "slices were up for 1 hours in all" in output
    assert cloud.state() == {"requests": {}, "created": 1}
    assert "interrupted and saved" in cloud.log(0, attempt=2)


def test_request_that_is_not_granted_in_time_ends_the_run(cloud):
    cloud.attempts(["WAITING_FOR_RESOURCES", "FAILED 3 the request has expired"])
    code, output = cloud.submit("--valid-until", "6h")
    assert code == 1 and "no slice within 6h" in output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_slice_that_does_not_come_up_is_given_back(cloud):
    cloud.attempts(["PROVISIONING"], ["ACTIVE"])
    cloud.trainer("0")
    cloud.environment["TPU_POD_PROVISION_SECONDS"] = "1"
    code, output = cloud.submit()
    assert code == 0 and "not up after 1 s" in output
    assert cloud.state() == {"requests": {}, "created": 2}


@pytest.mark.slow
def test_node_that_is_gone_while_the_request_looks_well_is_replaced(cloud):
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.change(lambda state: state["requests"]["run"]["nodes"].update(run="PREEMPTED"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "run is PREEMPTED" in output
    assert cloud.state() == {"requests": {}, "created": 2}


@pytest.mark.slow
def test_host_that_falls_silent_is_replaced(cloud):
    cloud.trainer("-", "0")
    cloud.environment |= {"TPU_POD_SILENT_SECONDS": "8", "TPU_POD_POLL_SECONDS": "1"}
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.power_off()  # and neither the node nor the request tells
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "a host is silent for 8 s" in output
    assert cloud.state() == {"requests": {}, "created": 2}


@pytest.mark.slow
def test_run_that_is_watched_elsewhere_is_left_alone_until_it_is_taken_over(cloud):
    cloud.trainer("0")
    cloud.put("watch", "watched office 4711 1700000000\n")
    code, output = cloud.submit()
    assert (
        code == 2 and "run run is being watched by process 4711 on office; if that is gone, add --take-over" in output
    )
    assert created(cloud) == 0
    code, output = cloud.submit("--take-over")
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


def test_second_submit_is_refused_and_a_take_over_ends_the_first(cloud):
    cloud.trainer("-", "0")
    first = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    code, output = cloud.submit()
    assert code == 2 and f"is being watched by process {first.pid}" in output
    second = cloud.start("submit", "--watch", "--take-over", *SUBMIT, *TRAINER)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "this watcher ends: watched" in output
    cloud.host_signal(0, signal.SIGTERM)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "value"), [("--zone", "europe-west4-a"), ("--type", "v4-8")])
def test_run_that_has_a_slice_gets_no_second_one_elsewhere_until_that_is_deleted(cloud, option, value):
    cloud.attempts(["WAITING_FOR_RESOURCES"], ["ACTIVE"])
    cloud.trainer("0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: created(cloud) == 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    elsewhere = ["submit", "--watch", *replaced(option, value), *TRAINER]
    code, output = cloud.run(*elsewhere)
    assert code == 2 and "error: run run has a slice (WAITING_FOR_RESOURCES) with " in output, output
    assert created(cloud) == 1
    assert cloud.run("delete", "--yes")[0] == 0
    code, output = cloud.run(*elsewhere)
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 2}
    if option == "--zone":  # what was on its way when the run moved
        cloud.somebody_elses(**{"run-id": re.search("RUN_ID=(.*)\n", cloud.object("run"))[1]})
        cloud.change(lambda state: state["requests"]["run"].update(zone="us-central2-b"))
        assert cloud.run("delete", "--yes")[0] == 0
        assert cloud.state()["requests"] == {}


@pytest.mark.slow
def test_two_slices_are_one_request_and_every_host_of_both_is_set_up(cloud):
    cloud.trainer("0")
    code, output = cloud.submit("--slices", "2")
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}
    create = cloud.calls("queued-resources create")[0]
    assert "--node-count=2" in create and "--node-prefix=run" in create
    ssh = [(call[4], call[7]) for call in cloud.calls("host.sh setup")]
    assert sorted(ssh) == [(f"run-{n}", f"--worker={worker}") for n in (0, 1) for worker in (0, 1)]
    assert all(cloud.object(f"attempts/1/host-{host}.status").startswith(f"{host} finished 0") for host in range(4))


def test_slice_deletes_itself_when_nobody_watches(cloud):
    cloud.trainer("-", "0")
    cloud.host(WORKER_IDLE_SECONDS=1)
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: all((cloud.folder / f"starts-{host}").exists() for host in (0, 1)))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for host in (0, 1):
        cloud.host_signal(host, signal.SIGTERM)
    cloud.wait_for(lambda: cloud.state()["requests"] == {})
    code, output = cloud.submit()
    assert code == 0 and "finished" in output
    assert created(cloud) == 1


@pytest.mark.slow
def test_expired_login_leaves_the_slice_and_the_watcher_goes_on(cloud):
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    expired = "ERROR: (gcloud) Reauthentication failed. cannot prompt during non-interactive execution."
    cloud.error("queued-resources describe", expired, times=3)
    cloud.wait_for(lambda: cloud.script_now()["errors"][0]["times"] == 0)
    for host in (0, 1):
        cloud.host_signal(host, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "gcloud's login has expired; run gcloud auth login" in output
    assert created(cloud) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux")
def test_detached_run_goes_on_without_a_terminal(cloud, tmp_path):
    cloud.trainer("0")
    server = tmp_path / "tmux"  # of this test alone
    server.mkdir()
    cloud.environment["TMUX_TMPDIR"] = str(server)
    # Where there is no user systemd, as in a container.
    cloud.environment["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/nowhere"
    cloud.environment.pop("XDG_RUNTIME_DIR", None)
    code, output = cloud.run("submit", "--detach", *SUBMIT, *TRAINER)
    assert code == 0 and "watching in the tmux session tpu-pod-run" in output, output
    log = cloud.folder / "local/tpu_pod/runs/run/watcher.log"
    cloud.wait_for(lambda: log.exists() and "the checkpoints are in" in log.read_text())
    assert cloud.state() == {"requests": {}, "created": 1}
    subprocess.run(["tmux", "kill-server"], env=cloud.environment, capture_output=True)
