"""Projections of a normalised residual stream, whose backward pass is our own, against the two steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from selective_attention.sharding import reshard
from selective_attention.transformer.projection import contract, normalised_projections, rms_norm

AXES = ("data", "fsdp", "context", "tensor")
PROJECTIONS = (
    ("bne,ef->bnf", ("embed", "mlp"), ("batch", "sequence", "mlp")),
    ("bne,ehd->bnhd", ("embed", "heads", None), ("batch", "sequence", "heads", None)),
)


def test_values_and_gradients_equal_those_of_the_two_steps_on_a_mesh():
    rng = np.random.default_rng(0)
    x, scale = 0.01 * rng.normal(size=(4, 8, 6)), rng.normal(size=6)  # so small that the norm's epsilon matters
    weights = rng.normal(size=(6, 8)), rng.normal(size=(6, 2, 4))
    cotangents = rng.normal(size=(4, 8, 8)), rng.normal(size=(4, 8, 2, 4))

    def gradients(project, dtype):
        def loss(x, scale, weights):
            outs = project(x, scale, [nnx.Param(w, axes=p[1]) for w, p in zip(weights, PROJECTIONS, strict=True)])
            return sum(jnp.sum(jnp.asarray(c, dtype) * out) for c, out in zip(cotangents, outs, strict=True))

        arguments = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, scale, weights))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)

    def two_steps(x, scale, weights):
        normed = rms_norm(x, scale)
        return [contract(p[0], normed, w, *p[2]) for w, p in zip(weights, PROJECTIONS, strict=True)]

    def ours(x, scale, weights):
        projections = [
            (p[0], nnx.Param(reshard(w[...], *p[1]), axes=p[1]), p[2])
            for w, p in zip(weights, PROJECTIONS, strict=True)
        ]
        return normalised_projections(jax.reshard(x, jax.P(("data", "fsdp"), "context")), scale, *projections)

    with jax.enable_x64():
        expected = gradients(two_steps, jnp.float64)
    with jax.set_mesh(jax.make_mesh((1, 2, 2, 2), AXES)):
        actual = gradients(ours, jnp.float32)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())
