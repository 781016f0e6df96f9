"""A digest of the arrays of a state: one number for each, the same on every mesh.

It is kept in the checkpoint itself, so that what arrives on the devices can be compared with what left them; and it
compares the replicas of the parameters during a run.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_BLOCK_ROWS = 256


def digest(state: Any) -> dict[str, int]:
    """A number below 2^32 for each array of a pytree, by its path: the same on every mesh, another after any bit flip.

    All hosts must call it alike, for the arrays span them.
    """
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    leaves = jax.tree.leaves(state)
    shardings = [leaf.sharding for leaf in leaves]
    if all(isinstance(sharding, jax.NamedSharding) for sharding in shardings):
        digests = _mesh_digests(shardings[0].mesh, tuple(sharding.spec for sharding in shardings))(leaves)
    else:
        digests = _device_digests(leaves)
    return dict(zip(names, jax.device_get(digests).tolist(), strict=True))


@functools.partial(jax.jit, static_argnames="shape")  # traced once for all arrays alike
def shard_digest(x: Array, starts: Sequence[Array | int], shape: tuple[int, ...]) -> Array:
    """uint32 scalar: the bits of a shard's elements times odd weights, summed modulo 2^32. Those of all shards add up
    to the whole array's.

    Args:
      x: The shard, on one device.
      starts: Where it begins in each dimension of the whole array.
      shape: Of the whole array.
    """
    x, starts, shape = (x, starts, shape) if x.ndim else (x[None], (0,), (1,))
    *leading, width = x.shape
    row, stride = jnp.zeros(leading, jnp.uint32), shape[-1]  # index of each row's first element
    for axis in reversed(range(len(leading))):
        position = starts[axis] + jax.lax.broadcasted_iota(jnp.uint32, leading, axis)
        row, stride = row + position * jnp.uint32(stride % 2**32), stride * shape[axis]
    column = starts[-1] + jnp.arange(width, dtype=jnp.uint32)

    def block_digest(block: tuple[Array, Array]) -> Array:
        values, rows = block
        bits = jax.lax.bitcast_convert_type(values, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        # An odd factor keeps every bit's change visible; the multiplier spreads neighbours, so that swaps are seen too.
        weight = (rows[:, None] + column) * jnp.uint32(2_654_435_761) | jnp.uint32(1)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    # Block by block: CPUs would otherwise keep all products, a copy of the array, and take five times as long.
    count = math.prod(leading)
    rows = math.gcd(count, _BLOCK_ROWS)
    blocks = x.reshape(count // rows, rows, width), row.reshape(count // rows, rows)
    return jnp.sum(jax.lax.map(block_digest, blocks), dtype=jnp.uint32)


@jax.jit
def _device_digests(leaves: list[Array]) -> Array:
    return jnp.stack([shard_digest(x, (0,) * x.ndim, x.shape) for x in leaves])


@functools.cache
def _mesh_digests(mesh: jax.sharding.Mesh, specs: tuple[jax.P, ...]) -> Callable[[list[Array]], Array]:
    def digests(leaves: list[Array]) -> Array:
        def local(shards: list[Array]) -> Array:
            found = [
                _first_replica_digest(x, spec, leaf.shape) for x, spec, leaf in zip(shards, specs, leaves, strict=True)
            ]
            return jax.lax.psum(jnp.stack(found), mesh.axis_names)

        return jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=jax.P(), check_vma=False)(leaves)

    return jax.jit(digests)


def _first_replica_digest(shard: Array, spec: jax.P, shape: tuple[int, ...]) -> Array:
    """Inside `shard_map`: of this device's shard, 0 on all but the first of the devices that hold it."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    axes += [()] * (len(shape) - len(axes))
    starts = [jax.lax.axis_index(names) * size if names else 0 for names, size in zip(axes, shard.shape, strict=True)]
    others = tuple(name for name in mesh.axis_names if name not in sum(axes, ()))
    value = shard_digest(shard, starts, shape)
    return jnp.where(jax.lax.axis_index(others) == 0, value, 0) if others else value
