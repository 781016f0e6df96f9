"""Matmuls with parameters on a mesh: of the residual stream as it is, and of the normalised one.

The plain form of `normalised_projections` is two lines, and is what the tests hold it to:

    normed_BNE = rms_norm(x_BNE, scale_E)
    outs = tuple(contract(subscripts, normed_BNE, weight, *axes) for subscripts, weight, axes in projections)

Its transpose, as JAX derives it, sums the gradient of `normed` twice, over E for the gradient of x and over B and N for
that of the scale, and both wait until it is whole. The transpose made by hand here has neither sum. With
`r = rsqrt(mean(x^2) + eps)` the forward pass is `n = x r`, `y = n (scale * W)`: the scale belongs to the weights, which
are small, and its gradient comes out of that of W. The gradient of x needs `c = mean_e(d_n n)`, and
`sum_e d_n n = sum_f d_y y` says it before d_n is there; so `d_x = r (d_n - n c)` is elementwise, done as the last
matmul of d_n leaves the MXU. The transpose needs each einsum's two transposes, which `Contraction` reads off its
subscripts.

Shape letters: the package's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ..implementations.tpu.rotary import EPSILON
from ..remat import keep
from ..sharding import Axes, partition_spec, reshard


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An einsum of activations with a weight, and the logical axes of the weight and of the result."""

    subscripts: str  # such as bne,ehd->bnhd
    weight_axes: Axes
    out_axes: Axes

    @property
    def letters(self) -> tuple[str, str, str]:
        """Of activations, weight and result."""
        operands, result = self.subscripts.split("->")
        x, weight = operands.split(",")
        return x, weight, result

    def gathered(self, weight: Array) -> Array:
        """`weight`, whole along fsdp."""
        return reshard(weight, *(None if a == "embed" else a for a in self.weight_axes))

    def apply(self, x: Array, gathered: Array) -> Array:
        return _einsum(self.subscripts, x, gathered, self.out_axes)

    def input_gradient(self, d_out: Array, gathered: Array, x_axes: Axes) -> Array:
        x, weight, out = self.letters
        return _einsum(f"{out},{weight}->{x}", d_out, gathered, x_axes)

    def weight_gradient(self, x: Array, d_out: Array) -> Array:
        letters, weight, out = self.letters
        return _einsum(f"{letters},{out}->{weight}", x, d_out, self.weight_axes)


def _einsum(subscripts: str, a: Array, b: Array, out_axes: Axes) -> Array:
    operands, result = subscripts.split("->")
    sizes = dict(zip(operands.replace(",", ""), a.shape + b.shape, strict=True))
    spec = partition_spec(out_axes, tuple(sizes[letter] for letter in result))
    return jnp.einsum(subscripts, a, b, out_sharding=spec)


def _contraction(subscripts: str, weight: nnx.Param, out_axes: Axes) -> Contraction:
    rank = len(subscripts.split("->")[0].split(",")[1])
    return Contraction(subscripts, weight.axes[-rank:], out_axes)  # a layer's slice has lost the leading L


def contract(subscripts: str, x: Array, weight: nnx.Param, *out_axes: str | None) -> Array:
    """einsum of activations with a parameter in the activations' dtype, gathered over fsdp; result laid out by
    `out_axes`.
    """
    contraction = _contraction(subscripts, weight, out_axes)
    return contraction.apply(x, contraction.gathered(weight[...].astype(x.dtype)))


def rms_norm(x: Array, scale: Array, epsilon: float = EPSILON) -> Array:
    """RMSNorm over the last axis, computed in float32 (or x's dtype, if wider); returns x's dtype."""
    return (_wide(x) * _inverse_rms(x, epsilon) * scale).astype(x.dtype)


def normalised_projections(
    x_BNE: Array, scale_E: Array, *projections: tuple[str, nnx.Param, Axes], epsilon: float = EPSILON
) -> tuple[Array, ...]:
    """`contract(subscripts, rms_norm(x, scale, epsilon), weight, *out_axes)` for each (subscripts, weight, out_axes),
    kept for the backward pass; subscripts begin with `bne,e`.
    """
    contractions = tuple(_contraction(subscripts, weight, axes) for subscripts, weight, axes in projections)
    return _project(contractions, epsilon, x_BNE, scale_E, tuple(weight[...] for _, weight, _ in projections))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(contractions: tuple[Contraction, ...], epsilon: float, x_BNE, scale_E, weights):
    return _project_forward(contractions, epsilon, x_BNE, scale_E, weights)[0]


def _project_forward(contractions, epsilon, x_BNE, scale_E, weights):
    inverse_BN1 = _inverse_rms(x_BNE, epsilon)
    normed_BNE = (_wide(x_BNE) * inverse_BN1).astype(x_BNE.dtype)
    outs = tuple(
        keep(contraction.apply(normed_BNE, _scaled(contraction, scale_E, weight, x_BNE.dtype)))
        for contraction, weight in zip(contractions, weights, strict=True)
    )
    return outs, (x_BNE, inverse_BN1, scale_E, weights, outs)


def _project_backward(contractions, _, residuals, d_outs):
    x_BNE, inverse_BN1, scale_E, weights, outs = residuals
    dtype = x_BNE.dtype
    normed_BNE = _wide(x_BNE) * inverse_BN1
    along_BN1 = jnp.zeros_like(inverse_BN1)
    d_normed_BNE, d_scale_E, d_weights = jnp.zeros_like(normed_BNE), jnp.zeros_like(scale_E), []
    for contraction, weight, out, d_out in zip(contractions, weights, outs, d_outs, strict=True):
        along_BN1 += jnp.sum(_wide(d_out) * _wide(out), axis=tuple(range(2, out.ndim)))[..., None]
        scaled = _scaled(contraction, scale_E, weight, dtype)
        d_normed_BNE += _wide(contraction.input_gradient(d_out, scaled, ("batch", "sequence", None)))
        d_scaled = contraction.weight_gradient(normed_BNE.astype(dtype), d_out).astype(weight.dtype)
        d_weights.append(_times(scale_E, d_scaled))
        d_scale_E += reshard(jnp.sum(d_scaled * weight, axis=tuple(range(1, weight.ndim))), None)
    d_x_BNE = inverse_BN1 * (d_normed_BNE - normed_BNE * (along_BN1 / x_BNE.shape[-1]))
    return d_x_BNE.astype(dtype), d_scale_E, tuple(d_weights)


_project.defvjp(_project_forward, _project_backward)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _inverse_rms(x: Array, epsilon: float) -> Array:
    wide = _wide(x)
    return keep(jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon))


def _times(scale_E: Array, weight: Array) -> Array:
    return weight * scale_E.reshape(-1, *(1,) * (weight.ndim - 1))


def _scaled(contraction: Contraction, scale_E: Array, weight: Array, dtype: jnp.dtype) -> Array:
    return contraction.gathered(_times(scale_E, weight).astype(dtype))
