"""The whole life of a run with the real trainer on the hosts: whatever happens to it, the same numbers come out."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.cloud import replaced
from tests.support.runs import TINY, assert_same_run

KINDS = {1: "v4-8", 2: "v4-16"}
RECLAIMED = ["PROVISIONING", "SUSPENDING", "FAILED 13 an internal error has occurred"]
# Steps enough that each disturbance finds the run at work.
FIELDS = TINY | {"steps": 90, "checkpoint.every_steps": 10, "eval.every_steps": 45, "mesh.data": 1}


def trainer_flags(hosts: int) -> list[str]:
    """Of a run on one emulated device a host: the parameters lie in parts on the hosts."""
    return ["--config=configs/demo.py", *(f"--config.{k}={v}" for k, v in (FIELDS | {"mesh.fsdp": hosts}).items())]


@pytest.fixture(scope="module")
def train_undisturbed(dataset_path, tmp_path_factory):
    """Trains on so many hosts to which nothing happens, without launcher and worker, and returns the workdir."""

    def train(hosts: int):
        workdir = tmp_path_factory.mktemp("undisturbed")
        command = [sys.executable, "-m", "launch.emulate", f"--hosts={hosts}", "--devices-per-host=1", "--"]
        command += [*trainer_flags(hosts), f"--workdir={workdir}", f"--config.data.path={dataset_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout
        return workdir

    return train


@pytest.fixture
def pod(cloud, dataset_path):
    """The cloud, whose hosts train with the code that was uploaded to them."""
    for file in dataset_path.iterdir():
        (cloud.folder / "buckets/bucket/data/demo" / file.name).write_bytes(file.read_bytes())
    python = cloud.folder / "python"
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    cloud.host(WORKER_BACKOFF_SECONDS=3, FAKE_TRAINER=python, XLA_FLAGS=flags)
    cloud.host(**{name: os.environ[name] for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")})
    return cloud


def submit(pod, hosts: int, workdir) -> subprocess.Popen:
    options = [*replaced("--type", KINDS[hosts]), "--watch", f"--workdir={workdir}", "--", *trainer_flags(hosts)]
    return pod.start("submit", *options, TPU_POD_POLL_SECONDS="1")


def run_to_step(pod, step: int) -> None:
    """Waits for a step of at least this number since host 0's last start."""

    def reached() -> bool:
        log = pod.host_log(0).rpartition("worker: start ")[2]
        return any(int(found) >= step for found in re.findall(r"step (\d+) ", log))

    pod.wait_for(reached, 240)


def announce_maintenance(pod, host: int) -> None:
    """Holds the trainer where it is until its worker has heard of it, however quick the steps are."""
    pod.host_signal(host, signal.SIGSTOP)
    (pod.folder / f"hosts/run-{host}/metadata/maintenance-event").write_text("TERMINATE_ON_HOST_MAINTENANCE")
    pod.wait_for(lambda: "worker: maintenance or preemption announced" in pod.host_log(host))
    pod.host_signal(host, signal.SIGCONT)


@pytest.mark.slow
def test_preempted_and_maintained_host_ends_bit_equal(pod, train_undisturbed, tmp_path):
    workdir = tmp_path / "workdir"
    pod.attempts(RECLAIMED, ["PROVISIONING", "ACTIVE"])
    process = submit(pod, 1, workdir)
    run_to_step(pod, 12)
    pod.preempt()
    pod.wait_for(lambda: pod.state()["created"] == 3)
    run_to_step(pod, 22)
    announce_maintenance(pod, 0)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output + pod.host_logs()
    assert pod.state() == {"requests": {}, "created": 3}
    assert "interrupted (exit code 75); starting again" in pod.log(0, attempt=3)
    assert_same_run(workdir, train_undisturbed(1))
    assert json.loads((workdir / "goodput.json").read_text())["starts"] == 3


@pytest.mark.slow
def test_whole_life_of_two_hosts_ends_bit_equal(pod, train_undisturbed, tmp_path):
    workdir = tmp_path / "workdir"
    pod.attempts(RECLAIMED, RECLAIMED, ["PROVISIONING", "ACTIVE"])
    process = submit(pod, 2, workdir)
    run_to_step(pod, 12)
    pod.preempt()
    pod.wait_for(lambda: pod.state()["created"] == 4)
    run_to_step(pod, 22)
    announce_maintenance(pod, 1)
    pod.wait_for(lambda: all("worker: start 2" in pod.host_log(host) for host in (0, 1)), 240)
    run_to_step(pod, 1)
    pod.host_signal(1, signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output + pod.host_logs()
    assert pod.state() == {"requests": {}, "created": 4}
    logs = [pod.log(host, attempt=4) for host in (0, 1)]
    assert all("(exit code 75); starting again" in log for log in logs), logs
    assert "crashed: ended by SIGKILL (exit code 137); starting again" in logs[1]
    # By its own watch, or because the other one is back and JAX aborts.
    assert re.search(r"worker: lost.* \(exit code (70|134)\); starting again", logs[0]), logs[0]
    assert_same_run(workdir, train_undisturbed(2))
