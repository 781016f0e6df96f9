"""The TPU kernels through the TPU compiler, for chips that are not here: what it makes of them stays under ceilings."""

import json
import pathlib
import subprocess
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).parents[3] / "benchmarks" / "tpu_kernels.py"
MIB = 2**20

pytestmark = pytest.mark.tpu_compile


def measure(*flags):
    pytest.importorskip("libtpu")
    command = [sys.executable, str(BENCHMARK), "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row["kernel"].removeprefix("selective_attention_"): row for row in json.loads(done.stdout)}


def test_v4_takes_fewer_bundles_with_selection_than_splash_attention_without():
    kernels = measure("--programs=selective", "--generations=v4", "--heads=12", "--width=64")
    assert kernels["forward"]["bundles"] < 4.5
    assert kernels["backward"]["bundles"] < 9.6
    assert sum(row["bundles"] for row in kernels.values()) < 14  # splash attention: 22.5
    assert max(row["vmem"] for row in kernels.values()) < 16 * MIB


def test_v5e_compiles_and_no_array_of_queries_by_keys_reaches_hbm():
    length, heads = 1024, 2
    shape = ("--batch=1", f"--length={length}", f"--heads={heads}")
    for row in measure("--programs=selective", "--generations=v5e", *shape).values():
        assert row["largest_array"] <= length * heads * 64 < length**2
        assert row["vmem"] < 16 * MIB


@pytest.mark.parametrize(("heads", "length"), [(16, 1024), (28, 2048)])  # two passes over the heads; chunks of queries
def test_wide_models_fit_vmem_at_long_contexts(heads, length):
    kernels = measure("--programs=selective", "--batch=2", f"--heads={heads}", f"--length={length}")
    assert max(row["vmem"] for row in kernels.values()) < 16 * MIB
