"""Thirty things that happen to one run under its supervisor: what comes out is what comes out of a quiet one."""

import itertools
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.damage import damage_newest_checkpoint
from tests.support.hosts import hosts_of
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED

pytestmark = pytest.mark.slow
STEPS_BETWEEN, SEED = 6, 30


def shape(hosts: int, devices: int, **mesh: int) -> dict[str, int]:
    axes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
    return {"hosts": hosts, "devices": devices} | {f"mesh__{axis}": size for axis, size in axes.items()}


HOME = shape(2, 4, data=2, fsdp=4)
ELSEWHERE = [shape(1, 8, fsdp=4, tensor=2), shape(4, 2, data=2, context=2, tensor=2), shape(2, 4, data=8), HOME]
# To one host; to the supervisor, which is started again by hand; to the files, while nothing runs.
TO_HOST = {"a host killed": signal.SIGKILL, "a host stopped": signal.SIGSTOP, "TERM to a host": signal.SIGTERM}
TO_HOST |= {"INT to a host": signal.SIGINT}
TO_POD = {"TERM to the supervisor": signal.SIGTERM, "INT to the supervisor": signal.SIGINT}
TO_POD |= {"the supervisor killed": signal.SIGKILL, "the newest checkpoint damaged": signal.SIGTERM}
RESIZE = "resized"
TINY_STEPS = {"model__num_heads": 2, "optimizer__warmup_steps": 1000, "checkpoint__every_steps": 10}
FLAGS = ("--restart", "--backoff-seconds=0.1", "--max-restarts=40", "--grace-seconds=5")


def reach(pod: subprocess.Popen, step: int, seen: list[str]) -> None:
    """Reads the pod's output until it has made so many steps."""
    for line in pod.stdout:
        seen.append(line)
        found = re.search(r"step (\d+) loss", line)
        if found and int(found[1]) >= step:
            return
    pytest.fail("the pod ended too early:\n" + "".join(seen[-100:]))


def test_thirty_events_leave_no_trace(start_pod, finish, loss_series, tmp_path):
    generator = random.Random(SEED)
    events = 3 * [*TO_HOST, *TO_POD]
    generator.shuffle(events)
    events += [RESIZE, "a host killed", RESIZE, "a host stopped", RESIZE, RESIZE]
    assert len(events) == 30
    steps = {"steps": STEPS_BETWEEN * (len(events) + 1)}
    code, output = finish(start_pod(tmp_path / "quiet", **HOME, **TINY_STEPS, **steps))
    assert code == EXIT_FINISHED, output

    workdir, where, places, seen, first_resize = tmp_path / "run", HOME, iter(ELSEWHERE), [], 0
    local = {"checkpoint__local_folder": tmp_path / "local", "checkpoint__local_every_steps": 4}

    def start() -> subprocess.Popen:
        return start_pod(workdir, pod=FLAGS, faults__peer_timeout_seconds=10, **where, **TINY_STEPS, **steps, **local)

    pod = start()
    for number, event in zip(itertools.count(1), events):
        reach(pod, STEPS_BETWEEN * number, seen)
        seen.append(f"--- {event}\n")
        if event in TO_HOST:
            hosts = hosts_of(pod)
            os.kill(hosts[generator.choice(sorted(hosts))], TO_HOST[event])
            continue
        pod.send_signal(TO_POD.get(event, signal.SIGTERM))
        code, output = finish(pod)
        seen.append(output)
        assert code == (-signal.SIGKILL if event == "the supervisor killed" else EXIT_PREEMPTED), "".join(seen[-100:])
        if event == "the newest checkpoint damaged":
            damage_newest_checkpoint(workdir)
        if event == RESIZE:
            where, first_resize = next(places), first_resize or STEPS_BETWEEN * number
        pod = start()
    code, output = finish(pod)
    Path(tmp_path / "log").write_text("".join([*seen, output]))
    assert code == EXIT_FINISHED, "".join([*seen[-100:], output])
    assert "".join(seen).count(" is damaged, set aside as ") == events.count("the newest checkpoint damaged")
    quiet, found = (np.array(loss_series(path)) for path in (tmp_path / "quiet", workdir))
    assert found[:, 0].tolist() == list(range(1, steps["steps"] + 1))  # none missing, none doubled
    np.testing.assert_array_equal(found[:first_resize], quiet[:first_resize])
    # Other meshes round otherwise, and Adam amplifies that; during the warm-up hardly.
    np.testing.assert_allclose(found, quiet, atol=1e-5)
