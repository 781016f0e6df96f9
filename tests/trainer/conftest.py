"""A small dataset, and the trainer as a process of its own."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import demo
from data import prepare

SENTENCE = "the mask of a token grows with every later query that finds it stale so old words fade from view"


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
def start_trainer(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts `python -m trainer` on eight emulated devices; options are config fields, flags come as they are."""

    cache = tmp_path_factory.mktemp("compilation_cache")  # all tests train the same program

    def start(workdir: Path, *flags: str, **fields: object) -> subprocess.Popen:
        settings = {**TINY, "data.path": dataset_path, **{k.replace("__", "."): v for k, v in fields.items()}}
        config = [f"--config.{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "trainer", "--config=configs/demo.py", f"--workdir={workdir}", *config, *flags]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start
