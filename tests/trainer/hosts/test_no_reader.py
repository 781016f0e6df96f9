"""Nobody reads what a run says, or its disk is full: it goes on, and hears signals and its watchdog all the same."""

import array
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.runs import TINY
from trainer.errors import EXIT_PEER_LOST, EXIT_PREEMPTED

F_SETPIPE_SZ, SMALLEST_PIPE = 1031, 4096


def fill_its_pipe(process: subprocess.Popen) -> None:
    """Returns when the process will stand still at its next line."""
    fcntl.fcntl(process.stdout, F_SETPIPE_SZ, SMALLEST_PIPE)
    waiting = array.array("i", [0])
    deadline = time.monotonic() + 60
    while waiting[0] < SMALLEST_PIPE - 300:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        fcntl.ioctl(process.stdout, termios.FIONREAD, waiting)


@pytest.mark.slow
def test_a_pod_nobody_listens_to_trains_to_the_end(start_pod, run_until, tmp_path):
    pod = start_pod(tmp_path, hosts=1, devices=8, steps=2000, eval__every_steps=10_000, checkpoint__every_steps=2000)
    run_until(pod, "step 3 ")
    fill_its_pipe(pod)
    assert pod.wait(timeout=300) == 0
    assert (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_a_pod_whose_log_is_on_a_full_disk_trains_to_the_end(small_disk, start_pod, tmp_path, dataset_path):
    config = [f"--config.{name}={value}" for name, value in {**TINY, "data.path": dataset_path}.items()]
    pod = ["launch.emulate", "--hosts=1", "--devices-per-host=8", "--", "--config=configs/demo.py"]
    command = [sys.executable, "-m", *pod, f"--workdir={tmp_path / 'run'}", *config]
    (small_disk / "filler").write_bytes(bytes(2_000_000))
    with (small_disk / "log").open("wb", buffering=0) as log:
        with pytest.raises(OSError, match="No space left"):
            while True:
                log.write(bytes(4096))
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_lines_that_went_nowhere_to_the_end_are_counted():
    program = "from launch.emulate import Output; o = Output(); o.say('one'); o.say('two'); o.close()"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "[pod] the last 2 lines are missing: nobody took them, or there was no space\n"


@pytest.mark.slow
def test_sigterm_ends_a_trainer_that_stands_still_in_a_write(start_trainer, run_until, tmp_path):
    process = start_trainer(tmp_path, steps=1_000_000, faults__exit_seconds=3)
    run_until(process, "step 3 ")
    fill_its_pipe(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED


@pytest.mark.slow
def test_the_watchdog_ends_a_trainer_that_stands_still_in_a_write(start_trainer, run_until, tmp_path):
    endless = {"steps": 1_000_000, "eval__every_steps": 1_000_000, "checkpoint__every_steps": 1_000_000}
    process = start_trainer(tmp_path, faults__step_timeout_seconds=5, **endless)
    run_until(process, "step 3 ")
    fill_its_pipe(process)
    assert process.wait(timeout=60) == EXIT_PEER_LOST


def test_sigterm_while_the_hosts_are_started_reaches_them(tmp_path):
    program = """
import os, signal, subprocess, sys
from launch import emulate
popen, started = subprocess.Popen, []
def start(*arguments, **options):
    if len(started) == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    started.append(popen(*arguments, **options))
    return started[-1]
subprocess.Popen = start
sys.exit(emulate.main(sys.argv[1:]))
"""
    pod = ["--hosts=2", "--devices-per-host=8", "--restart", "--", "--config=configs/demo.py", f"--workdir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", program, *pod], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_PREEMPTED and "host 0: 75, host 1: 75" in done.stdout, done.stdout
    assert "restart" not in done.stdout


@pytest.mark.slow
def test_the_supervisor_counts_restarts_anew_from_each_newer_checkpoint(start_pod, run_until, finish, tmp_path):
    pod = start_pod(tmp_path, hosts=1, devices=8, pod=("--restart", "--max-restarts=1", "--backoff-seconds=0.1"))
    for step in (12, 22):
        run_until(pod, f"step {step} ")
        os.kill(int(Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()[0]), signal.SIGKILL)
    code, output = finish(pod)
    assert code == 0 and "restart 1 of at most 1" in output, output
