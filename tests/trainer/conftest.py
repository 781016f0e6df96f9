"""The trainer as a process of its own, and disks that fill up or stand still."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import demo
from tests.support import ROOT
from tests.support.disks import FreezingDisk
from tests.support.runs import TINY, assert_same_run, losses

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def tiny_config(dataset_path: Path) -> ConfigDict:
    """configs/demo.py at the sizes of TINY."""
    config = demo.get_config()
    config.update_from_flattened_dict(TINY | {"data.path": str(dataset_path)})
    return config


@pytest.fixture(scope="session")
def start_process(dataset_path: Path) -> Start:
    """Starts a program with the trainer's flags behind it; options are config fields, flags come as they are."""

    def start(program: list[str], workdir: Path, *flags: str, **fields: object) -> subprocess.Popen:
        settings = {**TINY, "data.path": dataset_path, **{k.replace("__", "."): v for k, v in fields.items()}}
        config = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", *program, "--config=configs/demo.py", f"--workdir={workdir}", *config, *flags]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture(scope="session")
def start_trainer(start_process: Start) -> Start:
    """Starts `python -m trainer` on eight emulated devices."""
    return lambda workdir, *flags, **fields: start_process(["trainer"], workdir, *flags, **fields)


@pytest.fixture(scope="session")
def start_pod(start_process: Start) -> Start:
    """Starts `python -m launch.emulate`; `pod` are its own flags."""

    def start(
        workdir: Path, *flags: str, hosts: int = 2, devices: int = 4, pod: tuple[str, ...] = (), **fields: object
    ) -> subprocess.Popen:
        program = ["launch.emulate", f"--hosts={hosts}", f"--devices-per-host={devices}", *pod, "--"]
        return start_process(program, workdir, *flags, **fields)

    return start


@pytest.fixture(scope="session")
def loss_series() -> Callable[[Path], list[tuple[int, float]]]:
    """Reads the loss series of a workdir."""
    return losses


@pytest.fixture(scope="session", name="assert_same_run")
def _assert_same_run() -> Callable[[Path, Path], None]:
    """Asserts that two finished runs ended in the same state, bit for bit, by the same losses."""
    return assert_same_run


@pytest.fixture(scope="session")
def run_until() -> Callable[[subprocess.Popen, str], str]:
    """Reads a process's output up to the line that holds a text, and returns it."""

    def run(process: subprocess.Popen, text: str) -> str:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if text in line:
                return "".join(seen)
        pytest.fail(f"{text!r} never came:\n{''.join(seen)}")

    return run


@pytest.fixture(scope="session")
def finish() -> Callable[[subprocess.Popen], tuple[int, str]]:
    """Waits for a process: its exit code and the rest of its output."""

    def wait(process: subprocess.Popen) -> tuple[int, str]:
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    return wait


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest):
    """A file system of 3 MB, or of the parameter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 3)}m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def freezing_disk(tmp_path: Path):
    """A file system of 64 MB."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(64 << 20))
    folder.mkdir()
    for command in (["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, folder]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
    if shutil.which("fsfreeze") is None:
        pytest.skip("there is no fsfreeze")
    yield FreezingDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)
