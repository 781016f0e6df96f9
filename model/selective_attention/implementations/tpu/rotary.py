"""QK normalisation and rotary positions of all heads, in one pass of a TPU kernel over columns [B, R, N].

XLA makes half a dozen passes of it: a reduction over a head's width and a rotation of its halves do not fuse. Here both
happen in registers: a head's width runs along sublanes, where sums are cheap and halves are whole registers. Decoding,
with one token a row, has rows of heads instead, as its kernel reads them.

Shape letters: as in `columns.py`, N positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .columns import LANES, from_columns, head_rows, lanes, pad, to_columns
from .program import on_platform

EPSILON = 1e-6
TOKENS = 8  # rows of a tile: what a grid step works on


def norm_rotary(x_BNHD: Array, scale_D: Array, cos_ND: Array, sin_ND: Array) -> Array:
    """`rotary(rms_norm(x, scale))`, rounded once to x's dtype; D a multiple of 32.

    Args:
      x_BNHD: [B, N, H, D].
      scale_D: float32 [D], of the normalisation.
      cos_ND, sin_ND: float32 [N, D / 2], of the positions' angles.
    """
    heads, width = x_BNHD.shape[2:]
    angles = [jnp.pad(angle_ND.T, ((0, 0), (0, -angle_ND.shape[0] % LANES))) for angle_ND in (cos_ND, sin_ND)]
    return from_columns(_norm_rotary(to_columns(x_BNHD, heads, width, LANES), scale_D, *angles), width, x_BNHD.shape)


@jax.custom_vjp
def _norm_rotary(x_BRN: Array, scale_D: Array, cos_DN: Array, sin_DN: Array) -> Array:
    return _call(_forward, 1, scale_D, cos_DN, sin_DN, x_BRN)


def _save(x_BRN: Array, scale_D: Array, cos_DN: Array, sin_DN: Array):
    return _norm_rotary(x_BRN, scale_D, cos_DN, sin_DN), (x_BRN, scale_D, cos_DN, sin_DN)


def _transpose(residuals, d_out_BRN: Array):
    x_BRN, scale_D, cos_DN, sin_DN = residuals
    d_x_BRN, d_scale_BDL = _call(_backward, 2, scale_D, cos_DN, sin_DN, x_BRN, d_out_BRN)
    return d_x_BRN, jnp.sum(d_scale_BDL, (0, 2)), None, None


_norm_rotary.defvjp(_save, _transpose)


def _call(kernel, num_results: int, scale_D: Array, cos_DN: Array, sin_DN: Array, *columns_BRN: Array):
    """Grid: (sequence, 128 positions). A second result is float32 [B, D, 128], summed over a sequence's steps."""
    batch, rows, length = columns_BRN[0].shape
    width = scale_D.shape[0]
    window = pl.BlockSpec((1, rows, LANES), lambda b, n: (b, 0, n))
    angle = pl.BlockSpec((width // 2, LANES), lambda b, n: (0, n))
    shapes = [jax.ShapeDtypeStruct(columns_BRN[0].shape, columns_BRN[0].dtype)]
    shapes += [jax.ShapeDtypeStruct((batch, width, LANES), jnp.float32)] * (num_results - 1)
    out_specs = [window, pl.BlockSpec((1, width, LANES), lambda b, n: (b, 0, 0))][:num_results]

    def run(operands, _, interpret):
        return pl.pallas_call(
            functools.partial(kernel, width),
            grid=(batch, length // LANES),
            in_specs=[pl.BlockSpec((width, LANES), lambda b, n: (0, 0)), angle, angle] + [window] * len(columns_BRN),
            out_specs=out_specs,
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name=f"norm_rotary{kernel.__name__}",
        )(*operands)

    scale_DL = jnp.broadcast_to(scale_D.astype(jnp.float32)[:, None], (width, LANES))
    made = on_platform(run, [scale_DL, cos_DN, sin_DN, *columns_BRN], ())
    return made[0] if num_results == 1 else made


def _normalised(x_DL: Array) -> tuple[Array, Array]:
    """A head without its scale, float32, and the factor [1, 128] that normalised it."""
    wide = x_DL.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=0, keepdims=True) + EPSILON)
    return wide * factor, factor


def _rotate(x_DL: Array, cos: Array, sin: Array) -> Array:
    x1, x2 = jnp.split(x_DL, 2, axis=0)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=0)


def _forward(width: int, scale_ref, cos_ref, sin_ref, x_ref, out_ref) -> None:
    for head in range(x_ref.shape[1] // width):
        rows = head_rows(head, width)
        scaled = _normalised(x_ref[0, rows])[0] * scale_ref[...]
        out_ref[0, rows] = _rotate(scaled, cos_ref[...], sin_ref[...]).astype(out_ref.dtype)


def _backward(width: int, scale_ref, cos_ref, sin_ref, x_ref, d_out_ref, d_x_ref, d_scale_ref) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _start_of_sequence():
        d_scale_ref[...] = jnp.zeros_like(d_scale_ref)

    for head in range(x_ref.shape[1] // width):
        rows = head_rows(head, width)
        normalised, factor = _normalised(x_ref[0, rows])
        d_scaled = _rotate(d_out_ref[0, rows].astype(jnp.float32), cos_ref[...], -sin_ref[...])
        d_scale_ref[0] += d_scaled * normalised
        d_normalised = d_scaled * scale_ref[...]
        along = jnp.mean(d_normalised * normalised, axis=0, keepdims=True)
        d_x_ref[0, rows] = (factor * (d_normalised - normalised * along)).astype(d_x_ref.dtype)


def norm_rotary_tokens(x_B1HD: Array, scale_D: Array, cos_B1D: Array, sin_B1D: Array) -> Array:
    """`rotary(rms_norm(x, scale))` of one token a row, each at its own position, rounded once to x's dtype.

    Heads lie side by side along lanes, as the projections write them and the decoding kernel reads them.

    Args:
      x_B1HD: [B, 1, H, D]; D is 32, 64 or 128.
      scale_D: float32 [D], of the normalisation.
      cos_B1D, sin_B1D: float32 [B, 1, D / 2], of the positions' angles.
    """
    (batch, _, heads, width), cos_BD, sin_BD = x_B1HD.shape, cos_B1D[:, 0], sin_B1D[:, 0]
    # A lane holds one of two halves: the first goes on as x1 cos - x2 sin, the second as x2 cos + x1 sin.
    angles = [jnp.concatenate(halves, axis=1) for halves in ((cos_BD, cos_BD), (-sin_BD, sin_BD))]
    cos_BL, sin_BL = (jnp.tile(angle_BD, (1, LANES // width)) for angle_BD in angles)
    scale_1L = jnp.tile(scale_D.astype(jnp.float32), LANES // width)[None]
    x_BR = pad(x_B1HD.reshape(batch, -1), LANES, 1)
    rows = TOKENS if batch % TOKENS == 0 else batch

    def run(operands, _, interpret):
        windows = [pl.BlockSpec((rows, x.shape[1]), lambda b: (b, 0)) for x in operands[1:]]
        return pl.pallas_call(
            functools.partial(_forward_tokens, width),
            grid=(batch // rows,),
            in_specs=[pl.BlockSpec((1, LANES), lambda b: (0, 0)), *windows],
            out_specs=windows[-1],
            out_shape=jax.ShapeDtypeStruct(x_BR.shape, x_BR.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            interpret=interpret,
            name="norm_rotary_tokens",
        )(*operands)

    out_BR = on_platform(run, [scale_1L, cos_BL, sin_BL, x_BR], ())
    return out_BR[:, : heads * width].reshape(x_B1HD.shape)


def _forward_tokens(width: int, scale_ref, cos_ref, sin_ref, x_ref, out_ref) -> None:
    shape, half = (x_ref.shape[0], LANES), width // 2
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    heads = [(lane >= start) & (lane < start + width) for start in range(0, LANES, width)]
    first_half = functools.reduce(jnp.logical_or, [own & (lane < n * width + half) for n, own in enumerate(heads)])
    for tile in range(x_ref.shape[1] // LANES):
        x = x_ref[:, lanes(tile)].astype(jnp.float32)
        factor = jnp.zeros(shape, jnp.float32)
        for own in heads:
            mean = jnp.sum(jnp.where(own, x * x, 0.0), axis=1, keepdims=True) / width
            factor = jnp.where(own, jax.lax.rsqrt(mean + EPSILON), factor)
        x *= factor * scale_ref[...]
        other_half = jnp.where(first_half, pltpu.roll(x, LANES - half, 1), pltpu.roll(x, half, 1))
        rotated = x * cos_ref[...] + other_half * sin_ref[...]
        out_ref[:, lanes(tile)] = rotated.astype(out_ref.dtype)
