"""Tokens to their embeddings, whose backward pass is our own."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from selective_attention.sharding import reshard
from selective_attention.transformer.embedding import lookup

TOKENS = np.arange(4 * 1024, dtype=np.int32).reshape(4, 1024) % 2  # each of two comes 2,048 times


def gradient(table_VE):
    def total(table_VE):
        table = nnx.Param(reshard(table_VE, "vocab", "embed"), axes=("vocab", "embed"))
        return jnp.sum(lookup(table, reshard(TOKENS, "batch", "sequence"), "bfloat16").astype(jnp.float32))

    return np.asarray(jax.jit(jax.grad(total))(table_VE))


def test_gradients_of_a_token_that_comes_often_are_not_lost_in_bfloat16():
    table_VE = np.ones((4, 8), np.float32)
    expected = np.repeat([[2048.0], [2048.0], [0.0], [0.0]], 8, axis=1)  # in bfloat16, 256 + 1 is 256
    np.testing.assert_array_equal(gradient(table_VE), expected)
    with jax.set_mesh(jax.make_mesh((2, 2, 1, 2), ("data", "fsdp", "context", "tensor"))):
        np.testing.assert_array_equal(gradient(table_VE), expected)
