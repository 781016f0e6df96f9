"""The examples run as they are, each by itself, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example):
    assert len(example.read_text().splitlines()) < 60
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, example], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
