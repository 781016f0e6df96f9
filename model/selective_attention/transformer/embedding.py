"""Tokens to their embeddings on a mesh, with a backward pass of its own.

A device's gradients are added in float32 to the rows of its tokens; what the mesh sums is of the activations' dtype, as
the gradients of all other matrices are. JAX would sum in float32, twice the bytes of the largest array there is.

Shape letters: the package's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ..sharding import AXES, TENSOR, partition_spec, reshard
from .projection import wide


def lookup(table: nnx.Param, tokens_BN: Array, dtype: str) -> Array:
    """[B, N, E] in `dtype`: rows of `table` [V, E], which is gathered in that dtype."""
    return _lookup(table.axes, jnp.dtype(dtype), table[...], tokens_BN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(axes, dtype, table_VE: Array, tokens_BN: Array) -> Array:
    spec = partition_spec(("batch", "sequence", None), (*tokens_BN.shape, table_VE.shape[1]))
    table_VE = table_VE.astype(dtype)
    return table_VE[tokens_BN] if spec is None else reshard(table_VE, None, None).at[tokens_BN].get(out_sharding=spec)


def _save(axes, dtype, table_VE, tokens_BN):
    return _lookup(axes, dtype, table_VE, tokens_BN), (table_VE, tokens_BN)


def _transpose(axes, dtype, residuals, d_x_BNE):
    table_VE, tokens_BN = residuals
    mesh = jax.sharding.get_abstract_mesh()

    def local(d_x_BNE, tokens_BN):
        zeros_VE = jnp.zeros(table_VE.shape, wide(d_x_BNE).dtype)
        summed_VE = zeros_VE.at[tokens_BN].add(wide(d_x_BNE)).astype(dtype)
        return (
            summed_VE if mesh.empty else jax.lax.psum(summed_VE, [a for a in AXES if a in mesh.shape and a != TENSOR])
        )

    if not mesh.empty:
        local = jax.shard_map(local, out_specs=jax.P(None, None), check_vma=False)
    return reshard(local(d_x_BNE, tokens_BN), *axes).astype(table_VE.dtype), None


_lookup.defvjp(_save, _transpose)
