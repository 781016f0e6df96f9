"""The examples run as they are, each by itself, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SLOW = ("metrics_writer", "packed_documents", "own_model")


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in EXAMPLES],
)
def test_an_example_runs(example):
    assert len(example.read_text().splitlines()) < 60
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, example], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
