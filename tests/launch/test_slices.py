"""One table of slices: what the planner accepts, the launcher accepts."""

import subprocess
import sys

import pytest

from launch.slices import TOPOLOGIES, assignments, find
from tests.support import ROOT


def ask(name: str) -> subprocess.CompletedProcess:
    # -S -I: the laptop's own Python, in which nothing of the project is installed.
    command = [sys.executable, "-S", "-I", "launch/slices.py", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["v4-8", "v5p-16", "v5e-1", "v5litepod-16", "v6e-1", "v6e-8"])
def test_a_slice_of_the_planner_is_one_of_the_shell(name):
    done = ask(name)
    assert done.returncode == 0 and done.stdout == assignments(find(name)) + "\n", done.stderr


@pytest.mark.parametrize("name", ["v4-4", "v5e-2", "v6e-0016", "v3-8", "v4", ""])
def test_what_is_no_slice_is_one_line_with_all_there_are(name):
    done = ask(name)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {name!r} is not a slice; choose one of {', '.join(TOPOLOGIES)}\n"


def test_every_slice_is_found_by_both_of_its_names():
    for topology in TOPOLOGIES.values():
        assert find(topology.name) is find(topology.accelerator_type) is topology
        assert topology.num_chips % topology.num_hosts == 0


def test_the_shell_is_told_what_cloud_tpu_and_gke_call_a_slice():
    assert assignments(find("v4-32")).split() == [
        "TYPE=v4-32", "HOSTS=4", "CHIPS=16", "TOPOLOGY=2x2x4", "RUNTIME=tpu-ubuntu2204-base",
        "GKE_ACCELERATOR=tpu-v4-podslice",
    ]  # fmt: skip
    assert assignments(find("v5e-8")).split() == [
        "TYPE=v5litepod-8", "HOSTS=1", "CHIPS=8", "TOPOLOGY=2x4", "RUNTIME=v2-alpha-tpuv5-lite",
        "GKE_ACCELERATOR=tpu-v5-lite-podslice",
    ]  # fmt: skip
