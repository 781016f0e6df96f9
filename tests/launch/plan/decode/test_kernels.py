"""A Pallas kernel that updates a cache in place counts by its schedule, as part of attention over the cache."""

import json
import os
import subprocess
import sys

import pytest

from launch.plan.schedule import environment
from tests.support import ROOT

pytestmark = pytest.mark.tpu_compile
COMPILE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from launch.plan.collectives import Network
from launch.plan.decode.parts import part_of
from launch.plan.hlo import Program
from launch.plan.schedule import kernel_cycles
from launch.plan.times import kernel_body, step_times
from launch.slices import find
topology, folder, steps, size = find("v4-8"), Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def body(x, out):
    out[...] = x[...] + 1

def kernel(x):  # one block a grid step, of which there are more than blocks: the same ones again
    block = pl.BlockSpec((size, 128), lambda i: (i % 2, 0))
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(steps,), in_specs=[block],
                          out_specs=block, input_output_aliases={0: 0}, name="takes_in")(x)

def step(x):
    with jax.named_scope("attention"), jax.named_scope("cache"):
        return kernel(x)

devices = np.array(topology.describe(1).devices[:1])
chip = jax.sharding.SingleDeviceSharding(devices.item(0))
x = jax.ShapeDtypeStruct((2 * size, 128), jnp.float32, sharding=chip)
program = Program(jax.jit(step, donate_argnums=0).lower(x).compile().as_text())
operations = list(program.operations())
(call,) = (o for o in operations if kernel_body(o))
parts = step_times(program, operations, Network({"data": 1}, devices, topology, 1), folder, part_of).milliseconds
print(json.dumps({"ms": parts["attention over the cache"], "in place": sorted(call.instruction.in_place),
                  "cycles": kernel_cycles(folder, [call.instruction.name], kernel_body(call))}))
"""


def compiled(folder, steps: int, size: int) -> dict:
    """Of a kernel of so many grid steps, over an array of 2 blocks of `size` x 128 values."""
    command = [sys.executable, "-c", COMPILE, str(folder), str(steps), str(size)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_where_its_schedule_takes_longer_than_its_bytes(tmp_path):
    made = compiled(tmp_path, steps=200, size=64)
    assert made["in place"] == [0]
    assert made["ms"] == pytest.approx(1e3 * made["cycles"] / 2 / 1.05e9)  # two cores
    assert made["cycles"] > 200 * 64 * 128 / 1024 * 2  # a load and a store for each 1,024 values


@pytest.mark.slow
def test_where_its_bytes_take_longer_they_are_read_and_not_counted_again_as_written(tmp_path):
    made = compiled(tmp_path, steps=1, size=4096)
    assert made["ms"] == pytest.approx(1e3 * 2 * 4096 * 128 * 4 / 1228e9)
