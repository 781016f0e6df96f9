"""The local tier on real pods: hosts that die between two checkpoints of the workdir go on from what they kept."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.hosts import hosts_of

pytestmark = pytest.mark.slow
# Sharded over both hosts, so that each needs its own part; the one checkpoint of the workdir is made at step 4.
SHARDED = {"mesh__data": 1, "mesh__fsdp": 8, "checkpoint__every_steps": 1000, "checkpoint__local_every_steps": 4}
FIRST = 4


def newest(local: Path, host: int) -> int:
    """The newest step that this host has kept whole."""
    return max(int(seal.name.partition(".")[0]) for seal in local.glob(f"*/host-{host}/*.checksums.json"))


def spoil(local: Path, host: int) -> None:
    for arrays in local.glob(f"*/host-{host}/*/arrays"):
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(start_pod, finish, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start_pod(workdir, **SHARDED))
    assert code == 0, output
    return workdir


@pytest.fixture(scope="module")
def killed_once(start_pod, run_until, tmp_path_factory):
    """A folder with `run` and `local` of a pod whose hosts were all killed at step 18."""
    folder = tmp_path_factory.mktemp("killed")
    pod = start_pod(folder / "run", **SHARDED, checkpoint__local_folder=folder / "local")
    run_until(pod, "step 18 ")
    pod.kill()  # its hosts die with it
    pod.communicate()
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def killed(killed_once):
    shutil.rmtree(killed_once)
    return shutil.copytree(killed_once.with_name("kept"), killed_once)


def test_a_restart_begins_at_the_newest_local_step_and_ends_bit_equal(
    start_pod, run_until, finish, assert_same_run, undisturbed, tmp_path
):
    local = tmp_path / "local"
    pod = start_pod(
        tmp_path / "run",
        pod=("--restart", "--backoff-seconds=0.1", "--max-restarts=3"),
        **SHARDED,
        checkpoint__local_folder=local,
    )
    run_until(pod, "step 18 ")
    os.kill(hosts_of(pod)[1], signal.SIGKILL)
    run_until(pod, "restart 1 of")
    expected = min(newest(local, host) for host in (0, 1))
    assert expected in (12, 16)  # of step 16 the writing may not have ended
    code, output = finish(pod)
    assert code == 0 and f"starting at step {expected} " in output, output
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list(local.iterdir())  # the workdir has it all


def test_what_one_host_has_lost_its_next_one_has(start_pod, finish, assert_same_run, undisturbed, killed):
    (gone,) = killed.glob("local/*/host-1")
    shutil.rmtree(gone)
    code, output = finish(start_pod(killed / "run", **SHARDED, checkpoint__local_folder=killed / "local"))
    assert code == 0 and "host 1's part comes from host 0" in output, output
    assert f"starting at step {newest(killed.with_name('kept') / 'local', 0)} " in output
    assert_same_run(killed / "run", undisturbed)


def test_where_both_are_damaged_the_workdirs_checkpoint_is_used(
    start_pod, finish, assert_same_run, undisturbed, killed
):
    for host in (0, 1):
        spoil(killed / "local", host)
    code, output = finish(start_pod(killed / "run", **SHARDED, checkpoint__local_folder=killed / "local"))
    assert code == 0 and f"starting at step {FIRST} " in output, output
    assert "is not used: host 0: " in output and "its CRC-32 is not" in output
    assert_same_run(killed / "run", undisturbed)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mesh__data": 2, "mesh__fsdp": 4}, "it was made on another mesh"),
        ({"hosts": 4, "devices": 2}, "it was made on another mesh, or by another number of hosts"),
        ({"optimizer__peak_lr": 0.004}, "optimizer.peak_lr: 0.005 -> 0.004"),
    ],
)
def test_what_does_not_fit_is_named_and_left_to_the_workdir(start_pod, run_until, finish, killed, change, why):
    pod = start_pod(killed / "run", **SHARDED | change, checkpoint__local_folder=killed / "local")
    code, output = finish(pod)
    assert "is not used: " in output and why in output, output
    if "optimizer__peak_lr" in change:
        assert code == 2 and f"checkpoint {FIRST} was made with another config" in output
        assert newest(killed / "local", 0) > FIRST  # still there for the right config
    else:
        assert code == 0 and f"starting at step {FIRST} " in output


def test_a_workdir_that_began_anew_does_not_see_the_old_runs_copies(start_pod, run_until, killed):
    shutil.rmtree(killed / "run")
    pod = start_pod(killed / "run", **SHARDED, checkpoint__local_folder=killed / "local")
    run_until(pod, "starting at step 0 ")
    run_until(pod, "step 9 ")
    pod.kill()
    pod.communicate()
    assert newest(killed / "local", 0) in (FIRST, 8)


def test_a_folder_that_cannot_be_made_is_a_mistake(start_pod, finish, tmp_path):
    (tmp_path / "file").touch()
    code, output = finish(start_pod(tmp_path / "run", checkpoint__local_folder=tmp_path / "file"))
    assert code == 2 and "--config.checkpoint.local_folder=" in output and "Not a directory" in output, output
