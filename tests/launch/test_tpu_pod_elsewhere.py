"""What reaches a watcher in the background and a person on another machine."""

import os
import shutil
import signal
import subprocess

import pytest

from .conftest import SUBMIT, TRAINER
from .test_tpu_pod_life import created


@pytest.fixture
def detached(cloud, tmp_path):
    """The cloud, where --detach uses a tmux server of this test alone."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux")
    server = tmp_path / "tmux"
    server.mkdir()
    cloud.environment |= {"TMUX_TMPDIR": str(server), "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere"}
    cloud.environment.pop("XDG_RUNTIME_DIR", None)
    # A server that runs already has an environment of its own.
    bare = {"PATH": os.environ["PATH"], "TMUX_TMPDIR": str(server)}
    subprocess.run(["tmux", "new-session", "-d", "-s", "other", "sleep 600"], env=bare, check=True)
    yield cloud
    subprocess.run(["tmux", "kill-server"], env=cloud.environment, capture_output=True)


def test_detached_watcher_has_the_settings_of_gcloud_and_the_run_when_that_is_said(detached):
    detached.trainer("-")
    code, output = detached.run("submit", "--detach", *SUBMIT, *TRAINER, CLOUDSDK_ACTIVE_CONFIG_NAME="work")
    assert code == 0 and "watching in the tmux session tpu-pod-run" in output, output
    assert detached.object("watch").startswith("watched ")
    pid = detached.object("watch").split()[2]
    with open(f"/proc/{pid}/environ") as file:
        environment = file.read().split("\0")
    assert "CLOUDSDK_ACTIVE_CONFIG_NAME=work" in environment
    assert f"XDG_STATE_HOME={detached.folder}/local" in environment
    os.kill(int(pid), signal.SIGTERM)


def test_detached_watcher_that_cannot_begin_is_no_success(detached):
    detached.put("watch", "watched office 4711 1700000000\n")
    code, output = detached.run("submit", "--detach", *SUBMIT, *TRAINER)
    assert code == 1 and "the watcher did not begin" in output and "process 4711 on office" in output


def test_network_options_of_a_run_are_known_on_another_machine(cloud):
    cloud.trainer("-")
    process = cloud.start("submit", "--watch", *SUBMIT, "--internal-ips", "--network", "n", *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    elsewhere = {"XDG_STATE_HOME": str(cloud.folder / "elsewhere")}
    run = ["--name", "run", "--bucket", "gs://bucket"]
    cloud.run("ssh", *run, **elsewhere)
    assert cloud.calls("tpu-vm ssh")[-1][-1] == "--internal-ip"
    assert cloud.run("stop", *run, **elsewhere)[0] == 0
    assert "--internal-ip" in cloud.calls("host.sh stop")[-1]
    assert created(cloud) == 1


def test_log_of_every_host_of_an_attempt_and_only_its_end(cloud):
    cloud.trainer("0")
    assert cloud.submit()[0] == 0
    cloud.put("attempts/1/host-0.log", "one\ntwo\nthree\n")
    cloud.put("attempts/1/host-1.log", "eins\nzwei\n")
    code, output = cloud.run("logs", "--host", "all", "--attempt", "1", "--tail", "2")
    assert (code, output) == (0, "host 0: two\nhost 0: three\nhost 1: eins\nhost 1: zwei\n")
    code, output = cloud.run("logs", "--attempt", "7")
    assert code == 2 and "no log of host 0 in attempt 7 (absent)" in output


def test_followed_log_of_a_run_at_its_end_ends(cloud):
    cloud.trainer("0")
    assert cloud.submit()[0] == 0
    code, output = cloud.run("logs", "-f")
    assert code == 0 and "step 1 loss 2.5" in output and "the run is at its end: finished attempt 1" in output
