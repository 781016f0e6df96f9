"""The second half of a layer, whose backward pass is our own, against its plain form in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention.implementations.tpu import swiglu as tpu
from selective_attention.sharding import reshard
from selective_attention.transformer.projection import contract, rms_norm
from selective_attention.transformer.swiglu import normalised_swiglu

AXES = ("data", "fsdp", "context", "tensor")
WEIGHT_AXES = ("embed", "mlp"), ("embed", "mlp"), ("mlp", "embed")


def parameters(weights):
    return [nnx.Param(reshard(w, *axes), axes=axes) for w, axes in zip(weights, WEIGHT_AXES, strict=True)]


def plain(x, scale, weights):
    gate, up, down = parameters(weights)
    normed = rms_norm(x, scale, 1e-6)
    hidden = [contract("bne,ef->bnf", normed, w, "batch", "sequence", "mlp") for w in (gate, up)]
    return x + contract("bnf,fe->bne", jax.nn.silu(hidden[0]) * hidden[1], down, "batch", "sequence", None)


def ours(fused, x, scale, weights):
    x = reshard(x, "batch", "sequence", None)
    return normalised_swiglu(x, scale, *parameters(weights), epsilon=1e-6, fused=fused)


# The kernels need 128 tokens on each device, and widths of whole lanes; two blocks of each width.
@pytest.mark.parametrize(
    ("fused", "mesh", "sizes"),
    [
        (False, (1, 2, 2, 2), (4, 8, 6, 8)),
        (True, (1, 2, 2, 1), (4, 128, 256, 384)),
        (True, (1, 4, 1, 1), (4, 128, 256, 384)),
    ],
    ids=["plain JAX on every axis", "kernels", "kernels, narrow shards"],
)
def test_values_and_gradients_equal_those_of_the_plain_form_on_a_mesh(fused, mesh, sizes, monkeypatch):
    monkeypatch.setattr(tpu, "MOST_WORK", 256 * 256 * 128)
    batch, length, model, width = sizes
    rng = np.random.default_rng(0)
    x, scale = 0.01 * rng.normal(size=(batch, length, model)), rng.normal(size=model)  # so small that epsilon matters
    weights = [rng.normal(size=size) / size[0] ** 0.5 for size in ((model, width), (model, width), (width, model))]
    cotangent = rng.normal(size=x.shape)

    def gradients(layer, dtype):
        def loss(*arguments):
            return jnp.sum(jnp.asarray(cotangent, dtype) * layer(*arguments))

        arguments = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, scale, weights))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)

    with jax.enable_x64():
        expected = gradients(plain, jnp.float64)
    with jax.set_mesh(jax.make_mesh(mesh, AXES)):
        actual = gradients(functools.partial(ours, fused), jnp.float32)
        assert ("pallas_call" in str(jax.make_jaxpr(functools.partial(ours, fused))(x, scale, weights))) == fused
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())
