"""Real plans: what is asked for, and what comes of it."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import ROOT

# A model that compiles in seconds, on two slices.
TINY = {"model.width": 2, "model.num_layers": 3, "model.vocab_size": 512, "batch_size": 8, "context_length": 256}
TINY |= {"mesh.fsdp": 2}
CHANGED = TINY | {"model.vocab_size": 1024, "optimizer.b2": 0.6875}
PLANS = {
    "d8, two slices": ["--config=configs/c4.py:d8", "--topology=v4-8", "--slices=2"],
    "tiny": ["--config=configs/c4.py:d8", "--topology=v4-8", "--slices=2"],
    "tiny, one slice": ["--config=configs/c4.py:d8", "--topology=v4-8"],
    "tiny, changed": ["--config=configs/c4.py:d8", "--topology=v4-8", "--slices=2"],
}
for plan in ("tiny", "tiny, one slice"):
    PLANS[plan] += [f"--config.{name}={value}" for name, value in TINY.items()]
PLANS["tiny, changed"] += [f"--config.{name}={value}" for name, value in CHANGED.items()]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A finished `python -m launch.plan`."""

    exit_code: int
    output: str
    errors: str
    folder: Path

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        return json.loads((self.folder / "plan.json").read_text())

    @functools.cached_property
    def hlo(self) -> str:
        return (self.folder / "hlo").read_text()


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.plan", *flags]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=1500)
