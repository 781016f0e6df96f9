"""Selective attention over a mesh: batch, heads and sequence sharded, here over eight emulated CPU devices.

python examples/mesh.py
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from selective_attention import selective_attention, sharded_selective_attention, zigzag_positions

BATCH, LENGTH, HEADS, WIDTH = 4, 256, 8, 32
mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"))

# Over `context` the sequence lies in zig-zag order, so that every device has the same amount of causal work.
order = zigzag_positions(LENGTH, mesh.shape["context"])
q, k, v = (jax.random.normal(key, (BATCH, LENGTH, HEADS, WIDTH)) for key in jax.random.split(jax.random.key(0), 3))
layout = jax.NamedSharding(mesh, jax.P("data", "context", "tensor"))


def loss(attention, q, k, v):
    return jnp.sum(attention(q, k, v) ** 2)


with jax.set_mesh(mesh):
    sharded = [jax.device_put(x[:, order], layout) for x in (q, k, v)]
    out = jax.jit(sharded_selective_attention)(*sharded)
    grads = jax.jit(jax.grad(lambda *qkv: loss(sharded_selective_attention, *qkv), argnums=(0, 1, 2)))(*sharded)
print(f"one device holds {out.addressable_shards[0].data.shape} of {out.shape}, sharded as {out.sharding.spec}")

expected = selective_attention(q, k, v)
expected_grads = jax.jit(jax.grad(lambda *qkv: loss(selective_attention, *qkv), argnums=(0, 1, 2)))(q, k, v)
back = np.argsort(order)
for name, one, many in zip(("out", "dq", "dk", "dv"), (expected, *expected_grads), (out, *grads), strict=True):
    difference = float(np.max(np.abs(np.asarray(many)[:, back] - np.asarray(one))))
    print(f"{name}: {difference:.1e} from one device's")
    assert difference < 1e-3
