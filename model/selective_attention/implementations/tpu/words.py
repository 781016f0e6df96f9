"""int8 slots on a TPU: how they lie, how one is replaced, and how they are multiplied.

Converting them to what the MXU takes is more work for the VPU than fetching them is for memory: to 32 bits, to float32,
to bfloat16. But a bfloat16 has seven bits behind its leading one, so that masks make two of them from a byte, without
any arithmetic: its lower seven bits, and its sign. The MXU, which waits most of the time, takes both.

Shape letters: as in `decode.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from ...quantised import bfloat16_scale
from .columns import LANES, dot

TILE = 8  # rows of 32 bits of a tile in HBM
BYTES = 4  # of a row
GROUP = TILE * BYTES  # slots of a tile of words
NEAREST = 1.5 * 2.0**23  # a sum with it has the nearest whole number in its lowest bits
BYTE = 64.0  # what products with `split` are multiplied with


def tile_slots(dtype: Any) -> int:
    """Slots that are written at once: those of a tile."""
    return GROUP if dtype == jnp.int8 else TILE


def in_words(x: Array) -> Array:
    """int8 slots [..., P, W] as they lie: the four that share a word of 32 bits are slots 2 s, 2 s + 16, 2 s + 1 and
    2 s + 17 of 32, so that a mask of words gives halves of words in the order of slots.
    """
    *leading, slots, width = x.shape
    x = x.reshape(*leading, slots // GROUP, 2, TILE, 2, width)
    return jnp.moveaxis(x, -4, -2).reshape(*leading, slots, width)


def from_words(x: Array) -> Array:
    """The inverse of `in_words`."""
    *leading, slots, width = x.shape
    x = x.reshape(*leading, slots // GROUP, TILE, 2, 2, width)
    return jnp.moveaxis(x, -2, -4).reshape(*leading, slots, width)


def store_bytes(x: Array, rows: Any, scales: Any, width: int, lanes: range) -> None:
    """Quantises tokens [R, W], heads of this width side by side: each number's byte, the lowest, into `rows`, int32 of
    this shape, and the heads' scales into these lanes of `scales`.
    """
    rows[...] = jnp.zeros(rows.shape, rows.dtype)
    together = max(LANES // width, 1) if LANES % width == 0 else 1  # heads that share registers
    for first in range(0, len(lanes), together):
        part = x[:, first * width : min(first + together, len(lanes)) * width]
        lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
        divisor = jnp.ones_like(part)
        for head in range(first, min(first + together, len(lanes))):
            start = (head - first) * width
            own = (lane >= start) & (lane < start + width)
            scale = bfloat16_scale(jnp.max(jnp.where(own, jnp.abs(part), 0.0), axis=1, keepdims=True))
            scales[:, lanes[head] : lanes[head] + 1] = scale
            divisor = jnp.where(own & (scale > 0), scale, divisor)
        near = jax.lax.bitcast_convert_type(part / divisor + NEAREST, jnp.int32)
        rows[:, first * width : first * width + part.shape[1]] = near


def with_byte(tile: Array, place: Array, new: Array) -> Array:
    """A tile in the order of `in_words` with one slot replaced by the lowest bytes of `new`, int32 [1, W]."""
    words = pltpu.bitcast(tile, jnp.int32)
    sublane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    row, half, later = (place >> 1) & 7, place & 1, place >> 4
    shift = 16 * half + 8 * later
    mask = jnp.where(sublane == row, jax.lax.shift_left(0xFF, shift), 0)
    return pltpu.bitcast(words ^ ((words ^ jax.lax.shift_left(new, shift)) & mask), tile.dtype)


def dot_cached(x: Array, cached: Array, slots: int, axis: int, dtype: Any) -> Array:
    """`x` times keys (axis 1) or values (axis 0) of the first `slots` of a block; int8 ones as operands of `dtype`.

    Of int8 it is the product over BYTE.
    """
    if cached.dtype != jnp.int8:
        return dot(x.astype(cached.dtype), cached[:slots], (1, axis))
    x = x.astype(dtype)
    low, sign = (part[:slots].astype(dtype) for part in split(cached))
    whole = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
    return dot(x, low, (1, axis)) - dot(x, sign, (1, axis)) - 2.0 * whole


def split(x: Array) -> tuple[Array, Array]:
    """Bytes [P, W] in the order of `in_words` as bfloat16 (low, sign) in the order of slots: BYTE (low - sign - 2).

    `low` has the lower seven bits behind a one, and is from 2 to 4; `sign` is 2 where there is a minus, else 0.
    """
    words = pltpu.bitcast(x, jnp.int32).reshape(-1, TILE, x.shape[1])
    later = jax.lax.shift_right_logical(words, 8)
    low = [(half & 0x007F007F) | 0x40004000 for half in (words, later)]
    sign = [half & 0x40004000 for half in (jax.lax.shift_left(words, 7), jax.lax.shift_right_logical(words, 1))]
    low_PW, sign_PW = (pltpu.bitcast(jnp.stack(part, 1), jnp.bfloat16).reshape(x.shape) for part in (low, sign))
    return low_PW, sign_PW
