"""Tiny runs, trained by the real trainer: finished, killed, resumed, stopped and diverged."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import demo
from data import prepare
from tests.support import ROOT
from trainer.errors import EXIT_PREEMPTED, DivergedError
from trainer.hosts.interrupt import Interrupt
from trainer.loop import train
from trainer.metrics.writer import MetricsWriter
from trainer.settings import read_settings

TEXT = "the mask of a token grows with every later query that finds it stale so old words fade from view"
HOSTILE = "<script>alert(1)</script> & <b>\"quoted\"</b> 'it' é"
NAMES = {"selective": "<i>selective</i>", "standard": "plain & standard"}


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(TEXT.split(), k=generator.randrange(22, 30))).capitalize() + "."


@pytest.fixture(scope="session")
def report_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English-like sentences in records of 256 tokens; the validation text begins with what HTML must escape."""
    folder, generator = tmp_path_factory.mktemp("report_data"), random.Random(0)
    for name, documents in (("train", 400), ("validation", 20)):
        with gzip.open(folder / f"c4-{name}.json.gz", "wt") as stream:
            for _ in range(documents):
                text = f"{HOSTILE}. {sentence(generator)} {sentence(generator)} The end."
                stream.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
    options = {"source": "c4", "output": folder / "prepared", "vocab-size": 320, "record-length": 256, "workers": 1}
    prepare.main(["--input", str(folder / "c4-*.json.gz"), *[f"--{name}={value}" for name, value in options.items()]])
    return folder / "prepared"


def train_tiny(
    dataset: Path, workdir: Path, variant: str = "selective", *writers: MetricsWriter, **more: object
) -> int:
    """Six steps by default; `more` are fields of the config, and `interrupt`."""
    config = demo.get_config(variant)
    interrupt = more.pop("interrupt", None)
    sizes = {"context_length": 128, "batch_size": 8, "steps": 6, "model.width": 1, "model.vocab_size": 320}
    mesh = {"mesh.data": -1, "mesh.fsdp": 1}
    often = {"eval.every_steps": 3, "eval.batches": 1, "checkpoint.every_steps": 2}
    config.update_from_flattened_dict({"data.path": str(dataset)} | sizes | mesh | often | more)
    return train(read_settings(config), str(workdir), interrupt, writers=writers)


@dataclasses.dataclass
class At(MetricsWriter):
    """Does something once the loss of a step is told."""

    step: int
    action: object

    def write(self, step, scalars):
        if step == self.step and "run/loss" in scalars:
            self.action()


def kill_this_process(workdir: Path) -> None:
    """When the first checkpoint is sealed."""
    while not (workdir / "checkpoints/2.checksums.json").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def runs(report_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workdirs of a selective and a standard run of 6 steps, by hostile names."""
    folder = tmp_path_factory.mktemp("runs")
    for variant in NAMES:
        assert train_tiny(report_dataset, folder / variant, variant) == 0
    return {name: folder / variant for variant, name in NAMES.items()}


@pytest.fixture(scope="session")
def killed(report_dataset: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose process got SIGKILL at step 5, with checkpoints of steps 2 and perhaps 4."""
    workdir = tmp_path_factory.mktemp("killed") / "killed"
    program = (
        "import tests.conftest; from pathlib import Path; from tests.launch.report import conftest as c; "
        f"data, workdir = Path({str(report_dataset)!r}), Path({str(workdir)!r}); "
        "c.train_tiny(data, workdir, 'selective', c.At(5, lambda: c.kill_this_process(workdir)), seed=1)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return workdir


@pytest.fixture(scope="session")
def resumed(killed: Path, report_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, started again and finished."""
    workdir = tmp_path_factory.mktemp("resumed") / "resumed"
    shutil.copytree(killed, workdir)
    assert train_tiny(report_dataset, workdir, seed=1) == 0
    return workdir


@pytest.fixture(scope="session")
def stopped(report_dataset: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after step 3, and saved."""
    workdir, interrupt = tmp_path_factory.mktemp("stopped") / "stopped", Interrupt()
    stop = At(3, lambda: setattr(interrupt, "requested", True))
    assert train_tiny(report_dataset, workdir, "selective", stop, interrupt=interrupt) == EXIT_PREEMPTED
    return workdir


@pytest.fixture(scope="session")
def diverged(report_dataset: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that calls each loss a spike, skips updates, goes back once, and gives up."""
    workdir = tmp_path_factory.mktemp("diverged") / "diverged"
    with pytest.raises(DivergedError):
        train_tiny(report_dataset, workdir, **{"faults.spike_factor": 0.5, "faults.max_bad_steps": 2})
    return workdir
