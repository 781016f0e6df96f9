"""Real processes that want the same workdir: one trains, the others say who does, and nobody waits for the dead."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support import ROOT
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, LeaseError
from trainer.hosts import lease
from trainer.hosts.lease import Holder, Lease

ELSEWHERE = Holder("elsewhere", pid=1, processes=4, since=0.0, machine="another", started="1")


@pytest.fixture
def held_elsewhere(tmp_path: Path) -> Path:
    """The lease that a process of another machine has on `tmp_path`, with its last sign of life an hour ago."""
    path = tmp_path / "lease" / "7"
    path.parent.mkdir()
    path.write_text(json.dumps(dataclasses.asdict(ELSEWHERE)))
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def holder_of(workdir: Path) -> int | None:
    """The number of the process that holds a workdir."""
    files = sorted((workdir / "lease").iterdir(), key=lambda path: int(path.name))
    return json.loads(files[-1].read_text()).get("pid")


def test_of_two_trainers_started_together_one_trains_and_the_other_says_who(start_trainer, finish, tmp_path):
    both = [start_trainer(tmp_path, steps=1_000_000) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    second, first = sorted(both, key=lambda process: process.poll() is None)
    code, output = finish(second)
    assert code == EXIT_FAILED, output
    expected = f"error: --workdir={tmp_path} is in use by process {first.pid} on {socket.gethostname()} since 20"
    assert expected in output and "Traceback" not in output, output
    assert holder_of(tmp_path) == first.pid
    for line in first.stdout:
        if "step 6 " in line:
            first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == EXIT_PREEMPTED
    assert holder_of(tmp_path) is None


@pytest.mark.slow
def test_a_pod_whose_first_host_was_killed_is_restarted_unhindered(start_pod, run_until, finish, tmp_path):
    pod = start_pod(tmp_path, pod=("--restart", "--backoff-seconds=0.1"), faults__peer_timeout_seconds=5)
    output = run_until(pod, "step 12 ")
    os.kill(int(re.findall(r"host 0: process (\d+)", output)[0]), signal.SIGKILL)
    code, output = finish(pod)
    assert code == 0 and "restart 1 of" in output, output
    assert "sign of life" not in output and "was left by" not in output and "in use" not in output


@pytest.mark.slow
def test_a_trainer_whose_workdir_was_taken_stops_without_writing(start_trainer, run_until, finish, tmp_path):
    rarely = {"eval__every_steps": 1_000_000, "checkpoint__every_steps": 1_000_000}
    process = start_trainer(tmp_path, steps=1_000_000, **rarely)
    run_until(process, "step 6 ")
    (tmp_path / "lease" / "2").write_text(json.dumps(dataclasses.asdict(ELSEWHERE)))
    code, output = finish(process)
    assert code == EXIT_FAILED, output
    assert "error: the workdir was taken over by process 1 on elsewhere and 3 more of its pod" in output
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_a_dead_process_of_another_machine_held_is_taken_over_at_once(held_elsewhere, tmp_path, caplog):
    with Lease() as ours:
        ours.take(str(tmp_path))
        assert holder_of(tmp_path) == os.getpid() and not held_elsewhere.exists()
    assert re.search(r"process 1 on elsewhere .* no sign of life for 3600 s: taking over", caplog.text)
    assert holder_of(tmp_path) is None


def test_what_another_machine_held_a_moment_ago_is_taken_over_once_it_stays_silent(
    held_elsewhere, tmp_path, caplog, monkeypatch
):
    os.utime(held_elsewhere)
    looks = []

    def as_time_goes_by(seconds: float) -> None:
        looks.append(seconds)
        monkeypatch.setattr(lease, "LEASE_SECONDS", -1.0 if len(looks) == 3 else 60.0)

    monkeypatch.setattr(lease.time, "sleep", as_time_goes_by)
    with Lease() as ours:
        ours.take(str(tmp_path))
        assert holder_of(tmp_path) == os.getpid() and len(looks) == 3
    assert "the workdir was left by process 1 on elsewhere" in caplog.text


def test_what_another_machine_holds_is_refused_at_its_next_sign_of_life(held_elsewhere, tmp_path, monkeypatch):
    os.utime(held_elsewhere, (time.time() - 30,) * 2)
    monkeypatch.setattr(lease.time, "sleep", lambda _: os.utime(held_elsewhere))
    with Lease() as ours, pytest.raises(LeaseError, match=r"in use by process 1 on elsewhere and 3 more of its pod"):
        ours.take(str(tmp_path))
    assert [path.name for path in held_elsewhere.parent.iterdir()] == ["7"]


@pytest.mark.slow
def test_of_many_that_would_take_over_at_once_one_does(held_elsewhere, tmp_path):
    program = """
import pathlib, sys
from trainer.hosts.lease import Lease, LeaseError
import jax
jax.process_index()
print("ready", flush=True)
sys.stdin.readline()
with Lease() as lease:
    try:
        lease.take(sys.argv[1])
        print("taken", flush=True)
    except LeaseError as error:
        print(error, flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    many = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    assert {process.stdout.readline() for process in many} == {"ready\n"}
    for process in many:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline() for process in many]
    for process in many:
        process.communicate("\n", timeout=60)
    assert said.count("taken\n") == 1
    (winner,) = [process.pid for process, line in zip(many, said, strict=True) if line == "taken\n"]
    assert all(f"in use by process {winner} on" in line for line in said if line != "taken\n"), said


class Objects(MemoryFileSystem):
    """A store of whole objects, which cannot touch them."""

    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]


@pytest.fixture
def objects(monkeypatch):
    """In place of what a workdir's address says."""
    storage = Objects(skip_instance_cache=True)
    monkeypatch.setattr(storage, "store", {})
    monkeypatch.setattr(lease.fsspec.core, "url_to_fs", lambda folder, **_: (storage, folder))
    return storage


def test_a_holder_gives_signs_of_life_to_an_object_store_and_gives_it_back(objects, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWAL_SECONDS", 0.01)
    path = f"{tmp_path}/lease/1"
    with Lease() as ours:
        ours.take(str(tmp_path))
        taken = objects.modified(path)
        while objects.modified(path) == taken:
            time.sleep(0.01)
        assert json.loads(objects.cat_file(path))["pid"] == os.getpid()
    assert "free" in json.loads(objects.cat_file(path))


def test_an_error_of_an_object_stores_own_is_said_in_a_line(objects, tmp_path, monkeypatch):
    def forbid(*_: object, **__: object) -> None:
        raise ValueError("Anonymous caller\nhas no access")

    monkeypatch.setattr(objects, "ls", forbid)
    expected = rf"^--workdir={tmp_path} cannot be taken: ValueError: Anonymous caller$"
    with Lease() as ours, pytest.raises(LeaseError, match=expected):
        ours.take(str(tmp_path))


def test_storage_that_hangs_does_not_keep_a_run_that_has_finished(objects, tmp_path, monkeypatch, caplog):
    hangs = threading.Event()
    monkeypatch.setattr(lease, "_PARTING_SECONDS", 0.1)
    with Lease() as ours:
        ours.take(str(tmp_path))
        monkeypatch.setattr(objects, "pipe_file", lambda *_: hangs.wait(20))
    assert "cannot be given back: storage does not answer" in caplog.text
    hangs.set()


def test_a_holder_that_has_not_seen_its_storage_for_long_may_complete_nothing_until_it_has(
    objects, tmp_path, monkeypatch
):
    for name in ("_RENEWAL_SECONDS", "_LOOK_SECONDS"):
        monkeypatch.setattr(lease, name, 0.01)
    tried, out_of_reach = threading.Event(), threading.Event()
    look = objects.ls

    def ls(*arguments: object, **options: object) -> object:
        if out_of_reach.is_set():
            tried.set()
            raise OSError("unreachable")
        return look(*arguments, **options)

    monkeypatch.setattr(objects, "ls", ls)
    with Lease() as ours:
        ours.confirm()
        ours.take(str(tmp_path))
        out_of_reach.set()
        assert tried.wait(60)
        monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)
        with pytest.raises(LeaseError, match="another run may have taken over"):
            ours.confirm()
        monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
        ours.confirm()


def test_a_process_that_proc_hides_counts_by_its_signs_of_life(monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    holder = Holder("here", ended.pid, machine=lease._machine(), started="1")
    assert holder.is_gone

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(lease.os, "kill", refuse)
    assert not holder.is_gone and not holder.is_here


def test_a_trainer_that_is_refused_leaves_the_other_ones_programs_alone(start_trainer, finish, tmp_path):
    suspects = tmp_path / ".unproven_programs-0"
    suspects.write_text("program")
    with Lease() as ours:
        ours.take(str(tmp_path))
        code, output = finish(start_trainer(tmp_path))
    assert code == EXIT_FAILED and f"in use by process {os.getpid()}" in output, output
    assert suspects.read_text() == "program"
