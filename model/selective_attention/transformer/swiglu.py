"""The second half of a layer, `x + SwiGLU(RMSNorm(x))`, with a backward pass of its own.

The plain form is what the tests hold it to:

    normed_BNE = rms_norm(x_BNE, scale_E)
    gate_BNU, up_BNU = (contract("bne,ef->bnf", normed_BNE, w, ...) for w in (w_gate, w_up))
    return x_BNE + contract("bnf,fe->bne", silu(gate_BNU) * up_BNU, w_down, ...)

Its transpose, as JAX derives it, sums the gradient of `normed` twice, over E for the gradient of x and over B and N for
that of the scale, and both wait until it is whole. The one here has neither sum. With `r = rsqrt(mean(x^2) + eps)` the
forward pass is `n = x r`, `gate = n (scale * W_gate)`: the scale belongs to the weights, which are small, and its
gradient comes out of those of the weights. The gradient of x needs `c = mean_e(d_n n)`, and
`sum_e d_n n = sum_f (d_gate gate + d_up up)` says it before d_n is there; so `d_x = r (d_n - n c)` is elementwise, done
as the last matmul of d_n leaves the MXU.

What stands between the matmuls is done on their operands and results by TPU kernels where `fused`, and otherwise by
the same formulas in plain JAX.

Shape letters: the package's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ..implementations.tpu import swiglu as tpu
from ..implementations.tpu.columns import LANES
from ..remat import keep
from ..sharding import TENSOR, Axes, partition_spec, reshard
from .projection import Contraction, contraction, inverse_rms, shard_width, wide

_STREAM, _HIDDEN = ("batch", "sequence", None), ("batch", "sequence", "mlp")


def normalised_swiglu(
    x_BNE: Array, scale_E: Array, w_gate: nnx.Param, w_up: nnx.Param, w_down: nnx.Param, epsilon: float, fused: bool
) -> Array:
    """`x + SwiGLU(rms_norm(x, scale, epsilon))`, weights [E, U], [E, U] and [U, E]; gate and up are kept for the
    backward pass. `fused` asks for the TPU's kernels, which are used where they can be.
    """
    into = tuple(contraction("bne,ef->bnf", w, _HIDDEN) for w in (w_gate, w_up))
    out = contraction("bnf,fe->bne", w_down, _STREAM)
    fused = fused and _fits(x_BNE, w_gate.shape[-1])
    return _swiglu((*into, out), epsilon, fused, x_BNE, scale_E, tuple(w[...] for w in (w_gate, w_up, w_down)))


def _fits(x_BNE: Array, width: int) -> bool:
    """Whether the kernels can work on what each device has, and it is more than a token of each row."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    tokens = x_BNE.shape[0] * x_BNE.shape[1] // devices
    whole = mesh.empty or mesh.shape.get(TENSOR, 1) == 1
    return whole and x_BNE.shape[1] > 1 and not any(n % LANES for n in (tokens, x_BNE.shape[2], width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _swiglu(contractions: tuple[Contraction, ...], epsilon: float, fused: bool, x_BNE, scale_E, weights):
    return _forward(contractions, epsilon, fused, x_BNE, scale_E, weights)[0]


def _forward(contractions, epsilon, fused, x_BNE, scale_E, weights):
    inverse_BN1 = inverse_rms(x_BNE, epsilon)
    w_gate, w_up, w_down = _gathered(contractions, scale_E, weights, x_BNE.dtype)
    if fused:
        made = _on_shards(tpu.hidden, (x_BNE, inverse_BN1), (w_gate, w_up), *[_HIDDEN] * 3)
        gate_BNU, up_BNU = (keep(x, matmul=True) for x in made[:2])
        kept_BNU = keep(made[2])
        h_BNU = made[2]  # JAX rounds what is both kept and used here once more, which no kernel would be fused with
    else:
        normed_BNE = (wide(x_BNE) * inverse_BN1).astype(x_BNE.dtype)
        gate_BNU = keep(contractions[0].apply(normed_BNE, w_gate))
        up_BNU = keep(contractions[1].apply(normed_BNE, w_up))
        gate = wide(gate_BNU)
        kept_BNU = h_BNU = (gate * tpu.sigmoid(gate) * wide(up_BNU)).astype(x_BNE.dtype)
    y_BNE = x_BNE + contractions[2].apply(h_BNU, w_down)
    return y_BNE, (x_BNE, inverse_BN1, scale_E, weights, gate_BNU, up_BNU, kept_BNU)


def _backward(contractions, _, fused, residuals, d_y_BNE):
    x_BNE, inverse_BN1, scale_E, weights, gate_BNU, up_BNU, h_BNU = residuals
    w_gate, w_up, w_down = _gathered(contractions, scale_E, weights, x_BNE.dtype)
    normed_BNE = wide(x_BNE) * inverse_BN1
    if fused:
        # The compiler lays U along the lanes of shards [U, E] whose E does not fill them.
        kernel = functools.partial(tpu.hidden_gradient, turn=shard_width(w_down.shape[1]) % LANES > 0)
        *made, along = _on_shards(kernel, (d_y_BNE, gate_BNU, up_BNU), (w_down,), _HIDDEN, _HIDDEN, _STREAM)
    else:
        d_h = wide(contractions[2].input_gradient(d_y_BNE, w_down))
        *made, along = tpu.swiglu_gradient(d_h, wide(gate_BNU), wide(up_BNU))
    d_gate, d_up = (d.astype(x_BNE.dtype) for d in made)
    mean_BN1 = jnp.sum(along, axis=-1, keepdims=True) / x_BNE.shape[-1]
    if fused:
        read = d_gate, d_up, mean_BN1, inverse_BN1, x_BNE, d_y_BNE
        (d_x_BNE,) = _on_shards(tpu.input_gradient, read, (w_gate, w_up), _STREAM)
    else:
        of_gate, of_up = contractions[0].input_gradient(d_gate, w_gate), contractions[1].input_gradient(d_up, w_up)
        d_normed_BNE = wide(of_gate) + wide(of_up)
        d_x_BNE = d_y_BNE + (inverse_BN1 * (d_normed_BNE - normed_BNE * mean_BN1)).astype(x_BNE.dtype)
    d_scale_E, d_weights = jnp.zeros_like(scale_E), []
    for one, weight, d_out in zip(contractions[:2], weights[:2], (d_gate, d_up), strict=True):
        d_scaled = one.weight_gradient(normed_BNE.astype(x_BNE.dtype), d_out).astype(weight.dtype)
        d_weights.append(d_scaled * scale_E[:, None])
        d_scale_E += reshard(jnp.sum(d_scaled * weight, axis=1), None)
    d_down = contractions[2].weight_gradient(h_BNU, d_y_BNE).astype(weights[2].dtype)
    return d_x_BNE, d_scale_E, (*d_weights, d_down)


_swiglu.defvjp(_forward, _backward)


def _gathered(contractions: tuple[Contraction, ...], scale_E: Array, weights: tuple[Array, ...], dtype) -> list[Array]:
    """As they are multiplied: those into U times the norm's scale."""
    *into, w_down = weights
    scaled = [weight * scale_E[:, None] for weight in into]
    return [one.gathered(w.astype(dtype)) for one, w in zip(contractions, (*scaled, w_down), strict=True)]


def _on_shards(
    kernel: Callable[..., list[Array]], of_tokens: tuple[Array, ...], weights: tuple[Array, ...], *axes: Axes
) -> list[Array]:
    """`kernel` on every device's own tokens, [B, N, ...] as [T, ...], and whole weights; its results [B, N, ...], laid
    out by `axes`.
    """

    def local(of_tokens, weights):
        rows = of_tokens[0].shape[:2]
        made = kernel(*(x.reshape(-1, x.shape[2]) for x in of_tokens), *weights)
        return [x.reshape(*rows, -1) for x in made]

    specs = [partition_spec(of_result, of_tokens[0].shape) for of_result in axes]
    if None in specs:
        return local(of_tokens, weights)
    return jax.shard_map(local, out_specs=specs, check_vma=False)(of_tokens, weights)
