"""Matmuls with parameters that a mesh has split so far that the TPU compiler would pad them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launch.plan.schedule import environment
from selective_attention.sharding import reshard
from selective_attention.transformer.projection import contract
from tests.support import ROOT

AXES = ("data", "fsdp", "context", "tensor")
# Subscripts, shapes of activations and of the weight, its logical axes and those of the result.
INTO_HEADS = "bne,ehd->bnhd", (8, 4, 128), (128, 4, 8), ("embed", "heads", None), ("batch", "sequence", "heads", None)
OUT_OF_HEADS = "bnhd,hde->bne", (8, 4, 4, 8), (4, 8, 128), ("heads", None, "embed"), ("batch", "sequence", None)
FEW_HEADS = "bne,ehd->bnhd", (8, 4, 128), (128, 3, 8), ("embed", "heads", None), ("batch", "sequence", "heads", None)


@pytest.mark.parametrize("projection", [INTO_HEADS, OUT_OF_HEADS, FEW_HEADS], ids=["into heads", "out of", "undivided"])
def test_values_and_gradients_with_narrow_shards_equal_those_of_one_device(projection):
    subscripts, x_shape, shape, weight_axes, out_axes = projection
    x_axes = {"e": None, "h": "heads", "d": None}
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-8, 8, size).astype(np.float32) for size in (x_shape, shape))  # whose sums are exact

    def total(x, weight):
        x = reshard(x, "batch", "sequence", *(x_axes[letter] for letter in subscripts.split(",")[0][2:]))
        weight = nnx.Param(reshard(weight, *weight_axes), axes=weight_axes)
        out = contract(subscripts, x, weight, *out_axes)
        return jnp.sum(out * out), out

    gradients = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    expected = gradients(x, weight)
    with jax.set_mesh(jax.make_mesh((1, 4, 1, 2), AXES)):  # shards of 32 along embed
        actual = gradients(x, weight)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Prints how many elements lie along lanes, of each array that is gathered or multiplied, or comes of it.
COMPILE = """
import re
import jax, jax.numpy as jnp
from flax import nnx
from configs.base import Mesh
from launch.plan.hlo import Program
from launch.slices import find
from selective_attention.transformer.projection import contract
from trainer.mesh import make_mesh
mesh = make_mesh(Mesh(data=1, fsdp=16), list(find("v4-32").describe(1).devices))
def array(*shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
AXES = ("embed", "heads", None), ("heads", None, "embed")
def total(weights, x):
    w_in, w_out = (nnx.Param(w, axes=axes) for w, axes in zip(weights, AXES))
    heads = contract("bne,ehd->bnhd", x.astype(jnp.bfloat16), w_in, "batch", "sequence", "heads", None)
    return jnp.sum(jnp.sin(contract("bnhw,hwe->bne", heads, w_out, "batch", "sequence", None).astype(jnp.float32)))
weights = array(768, 12, 64, spec=("fsdp",)), array(12, 64, 768, spec=(None, None, "fsdp"))
with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(total)).lower(weights, array(256, 512, 768, spec=("fsdp",))).compile()
program = Program(step.as_text())
for one in list(program.instructions.values()):
    if one.opcode in ("all-gather", "all-gather-start", "convolution"):
        for made in (one, *map(program.instructions.get, one.operands())):
            for shape, minor in re.findall(r"bf16\\[([\\d,]+)\\]\\{(\\d+)", made.result):
                print(one.opcode, shape, shape.split(",")[int(minor)])
"""


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_heads_of_narrow_shards_leave_no_lanes_empty():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert {"convolution", "all-gather"} <= {opcode.removesuffix("-start") for opcode, *_ in found}
    assert not [line for line in found if int(line[-1]) < 128]
