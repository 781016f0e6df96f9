"""The kernel of QK normalisation and rotary positions, interpreted, against its two steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selective_attention.transformer.projection import rms_norm
from selective_attention.transformer.transformer import fused_norm_rotary, rotary

AXES = ("data", "fsdp", "context", "tensor")


def test_values_and_gradients_equal_those_of_the_two_steps_on_a_mesh():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 2, 66, 2, 64))
    scale, position = rng.normal(size=64), rng.permutation(66)

    def gradients(function, dtype):
        def loss(x, scale):
            return jnp.sum(jnp.asarray(weight, dtype) * function(x, scale))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.asarray(x, dtype), jnp.asarray(scale, dtype))

    with jax.enable_x64():
        expected = gradients(lambda x, scale: rotary(rms_norm(x, scale), position, 1e4), jnp.float64)
    with jax.set_mesh(jax.make_mesh((1, 2, 2, 2), AXES)):
        actual = gradients(lambda x, scale: fused_norm_rotary(x, scale, position, 1e4, "heads"), jnp.float32)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())


SHAPES = [(3, 2, 64), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((8, 3, 32), (16, 1, 128)))]


@pytest.mark.parametrize(("batch", "heads", "width"), SHAPES)
def test_one_token_a_row_equals_the_two_steps_at_positions_of_its_own(batch, heads, width):
    rng = np.random.default_rng(1)
    x, scale = rng.normal(size=(batch, 1, heads, width)), rng.normal(size=width)
    position_B1 = rng.integers(0, 64, (batch, 1))
    with jax.enable_x64():
        expected = rotary(rms_norm(jnp.asarray(x), jnp.asarray(scale)), position_B1, 1e4)
    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), position_B1, 1e4, "heads"
    np.testing.assert_allclose(fused_norm_rotary(*arguments), expected, atol=5e-5)
    with jax.set_mesh(jax.make_mesh((1, 1, 2, 2), AXES)):
        np.testing.assert_allclose(fused_norm_rotary(*arguments), expected, atol=5e-5)
