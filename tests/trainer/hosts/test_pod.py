"""Real processes, joined into a pod, stopped, killed and hung: what the others do, and how the run ends."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.hosts import hosts_of
from trainer.errors import EXIT_MISTAKE, EXIT_PEER_LOST, EXIT_PREEMPTED

ENDLESS = {"steps": 1_000_000, "eval__every_steps": 1_000_000, "checkpoint__every_steps": 1_000_000}
NUM_KILLS = 20


@pytest.fixture(scope="module")
def undisturbed(start_pod, finish, tmp_path_factory):
    """A run of 2 x 4 that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start_pod(workdir))
    assert code == 0, output
    return workdir


@pytest.mark.slow
def test_sigterm_on_one_host_saves_on_all_and_the_run_ends_bit_equal(
    start_pod, run_until, finish, assert_same_run, undisturbed, tmp_path
):
    step = 13  # neither a checkpoint nor an evaluation is due
    pod = start_pod(tmp_path)
    run_until(pod, f"step {step} ")
    os.kill(hosts_of(pod)[1], signal.SIGTERM)
    code, output = finish(pod)
    assert code == EXIT_PREEMPTED and "host 0: 75, host 1: 75" in output, f"SIGTERM at step {step}:\n{output}"
    code, output = finish(start_pod(tmp_path))
    assert code == 0, output
    assert f"starting at step {step - 1} " not in output  # nothing is done twice
    assert_same_run(tmp_path, undisturbed)
    goodput = json.loads((tmp_path / "goodput.json").read_text())
    assert goodput["starts"] == 2 and goodput["seconds"]["repeated_steps"] == 0
    total = goodput["updated_at"] - goodput["first_started_at"]
    assert sum(goodput["seconds"].values()) == pytest.approx(total, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "host"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 1),
        (signal.SIGSTOP, 0),
        (signal.SIGSTOP, 1),
    ],
)
def test_a_lost_host_is_named_and_the_others_leave(start_pod, run_until, finish, tmp_path, number, host):
    pod = start_pod(tmp_path, pod=("--grace-seconds=30",), faults__peer_timeout_seconds=5, **ENDLESS)
    run_until(pod, "step 6 ")
    victim, survivor = hosts_of(pod)[host], 1 - host
    os.kill(victim, number)
    lines = run_until(pod, f"leaving with exit code {EXIT_PEER_LOST}")
    assert f"host {survivor}: host {host} of 2 (" in lines.splitlines()[-1]
    if number == signal.SIGSTOP:
        os.kill(victim, signal.SIGKILL)
    _, output = finish(pod)
    assert f"host {survivor}: {EXIT_PEER_LOST}" in output


@pytest.mark.slow
def test_the_supervisor_restarts_after_a_crash_and_the_run_ends_bit_equal(
    start_pod, run_until, finish, assert_same_run, undisturbed, tmp_path
):
    pod = start_pod(tmp_path, pod=("--restart", "--backoff-seconds=0.1"), faults__peer_timeout_seconds=5)
    run_until(pod, "step 12 ")
    os.kill(hosts_of(pod)[1], signal.SIGKILL)
    code, output = finish(pod)
    assert code == 0 and "restart 1 of" in output, output
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_the_supervisor_does_not_restart_a_mistake(start_pod, finish, tmp_path):
    code, output = finish(start_pod(tmp_path, pod=("--restart",), batch_size=7))
    assert code == EXIT_MISTAKE and "restart" not in output
    assert output.count("batch_size=7") >= 1


def test_no_host_outlives_the_supervisor(start_pod, run_until, tmp_path):
    pod = start_pod(tmp_path, **ENDLESS)
    run_until(pod, "step 3 ")
    hosts = hosts_of(pod)
    assert len(hosts) == 2
    pod.kill()
    pod.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and is_running(pid) for pid in hosts.values()):
        assert time.monotonic() < deadline, "a trainer still runs"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_kills_at_random_moments_end_bit_equal(start_pod, finish, assert_same_run, tmp_path):
    steps = {"steps": 120}
    code, output = finish(start_pod(tmp_path / "undisturbed", **steps))
    assert code == 0, output
    start = time.monotonic()
    flags = ("--restart", "--backoff-seconds=0.1", "--max-restarts=100", "--grace-seconds=20")
    pod = start_pod(tmp_path / "killed", pod=flags, faults__peer_timeout_seconds=5, **steps)
    generator = random.Random(0)
    kills = 0
    while kills < NUM_KILLS and pod.poll() is None:
        # Starting takes a few seconds: this hits start-up, compilation, restore, steps and saves alike.
        time.sleep(generator.uniform(0.5, 9))
        hosts = hosts_of(pod)
        if hosts:
            os.kill(hosts[generator.choice(sorted(hosts))], signal.SIGKILL)
            kills += 1
    code, output = finish(pod)
    assert code == 0, output[-5000:]
    print(f"{kills} kills, finished after {time.monotonic() - start:.0f} s")
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_other_numbers_of_hosts_and_other_meshes_go_on_with_the_same_batches(start_pod, finish, loss_series, tmp_path):
    shape = {"model__num_heads": 2, "optimizer__warmup_steps": 1000}
    parts = (
        (10, 2, 4, {"data": 8}),
        (20, 1, 8, {"fsdp": 4, "tensor": 2}),
        (30, 4, 2, {"data": 2, "context": 2, "tensor": 2}),
    )
    series = {}
    for name in ("moved", "undisturbed"):
        for steps, hosts, devices, mesh in parts:
            if name == "undisturbed":
                steps, hosts, devices, mesh = parts[-1][0], 2, 4, {"data": 8}
            axes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
            axis_fields = {f"mesh__{axis}": size for axis, size in axes.items()}
            # Stopped by the clock of the run: the schedule must not depend on where a part ends.
            pod = start_pod(tmp_path / name, hosts=hosts, devices=devices, steps=30, **shape, **axis_fields)
            if steps < 30:
                for line in pod.stdout:
                    if f"step {steps} " in line:
                        pod.send_signal(signal.SIGTERM)
                        break
            code, output = finish(pod)
            assert code == (EXIT_PREEMPTED if steps < 30 else 0), output[-3000:]
            if name == "undisturbed":
                break
        series[name] = loss_series(tmp_path / name)
    steps, values = zip(*series["moved"], strict=True)
    expected_steps, expected = zip(*series["undisturbed"], strict=True)
    assert steps == expected_steps
    # Other meshes round otherwise, and Adam amplifies that; during the warm-up hardly.
    np.testing.assert_allclose(values, expected, atol=1e-4)


@pytest.mark.slow
def test_sigterm_before_the_first_step_leaves_at_once_on_all_hosts(start_pod, run_until, finish, tmp_path):
    pod = start_pod(tmp_path)
    run_until(pod, "parameters: ")  # the compiler is about to start
    os.kill(hosts_of(pod)[1], signal.SIGTERM)
    code, output = finish(pod)
    assert code == EXIT_PREEMPTED and "host 0: 75, host 1: 75" in output, output
    assert "nothing to save" in output and "compiled the train step" not in output.split("nothing to save")[0]


@pytest.mark.slow
def test_a_warm_restart_compiles_nothing_on_any_host(start_pod, run_until, finish, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    compiled = []
    for step in (7, 12, 17):  # behind a checkpoint and, from step 10 on, an evaluation
        pod = start_pod(tmp_path / "run", **ENDLESS | {"checkpoint__every_steps": 5, "eval__every_steps": 5})
        run_until(pod, f"step {step} ")
        os.kill(hosts_of(pod)[1], signal.SIGKILL)
        finish(pod)
        compiled.append({path.name for path in cache.glob("*.sealed")})
    steps = [sorted(name for name in names if name.startswith("jit_train_step-")) for names in compiled]
    assert len(steps[0]) == 2  # one a host: on CPUs a program names its devices
    assert steps[1] == steps[0]
    assert compiled[2] == compiled[1], sorted(compiled[2] - compiled[1])
