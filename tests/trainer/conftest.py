"""A small dataset, and the trainer as a process of its own."""

import contextlib
import dataclasses
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import demo
from data import prepare

SENTENCE = "the mask of a token grows with every later query that finds it stale so old words fade from view"
RARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40,000 tokens in records of 64, 300 pieces."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for name, documents in (("train", 1500), ("validation", 60)):
        with gzip.open(folder / f"c4-{name}.json.gz", "wt") as stream:
            for _ in range(documents):
                text = " ".join(generator.choices(SENTENCE.split(), k=generator.randrange(5, 60)))
                stream.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
            for letter in RARE:  # each in one document only
                stream.write(json.dumps({"text": f"{SENTENCE} {letter} {SENTENCE}", "timestamp": "", "url": ""}) + "\n")
    options = {"source": "c4", "output": folder / "prepared", "vocab-size": 300, "record-length": 64, "workers": 1}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    prepare.main(["--input", str(folder / "c4-*.json.gz"), *arguments])
    return folder / "prepared"


TINY: dict[str, object] = {
    "context_length": 32,
    "batch_size": 16,
    "steps": 30,
    "model.width": 1,
    "model.vocab_size": 300,
    "optimizer.warmup_steps": 10,
    "checkpoint.every_steps": 5,
    "eval.every_steps": 10,
    "log_every_steps": 1,
}


@pytest.fixture
def tiny_config(dataset_path: Path) -> ConfigDict:
    """configs/demo.py at the sizes of TINY."""
    config = demo.get_config()
    config.update_from_flattened_dict(TINY | {"data.path": str(dataset_path)})
    return config


Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="session")
def start_process(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts a program with the trainer's flags behind it; options are config fields, flags come as they are."""

    cache = tmp_path_factory.mktemp("compilation_cache")  # all tests train the same program

    def start(program: list[str], workdir: Path, *flags: str, **fields: object) -> subprocess.Popen:
        settings = {**TINY, "data.path": dataset_path, **{k.replace("__", "."): v for k, v in fields.items()}}
        config = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", *program, "--config=configs/demo.py", f"--workdir={workdir}", *config, *flags]
        environment = {"JAX_COMPILATION_CACHE_DIR": str(cache)} | os.environ
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

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


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    with ocp.training.Checkpointer(workdir / "checkpoints") as checkpointer:
        # Another number of processes wrote it: say where its arrays shall go.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = checkpointer.metadata(step).metadata
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
        state = checkpointer.load(step, abstract)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def losses(workdir: Path) -> list[tuple[int, float]]:
    """The loss series that TensorBoard shows."""
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


@pytest.fixture(scope="session")
def loss_series() -> Callable[[Path], list[tuple[int, float]]]:
    """Reads the loss series of a workdir."""
    return losses


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Asserts that two finished runs ended in the same state, bit for bit, by the same losses."""

    def check(workdir: Path, undisturbed: Path) -> None:
        result = json.loads((undisturbed / "result.json").read_text())
        steps = result["steps"]
        expected, state = saved_state(undisturbed, steps), saved_state(workdir, steps)
        assert expected.keys() == state.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)
        assert losses(workdir) == losses(undisturbed)
        assert [step for step, _ in losses(workdir)] == list(range(1, steps + 1))  # none missing, none doubled
        assert json.loads((workdir / "result.json").read_text()) == result

    return check


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


@dataclasses.dataclass
class FreezingDisk:
    """A file system whose writers can be made to wait."""

    folder: Path

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self.folder], check=True)


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
