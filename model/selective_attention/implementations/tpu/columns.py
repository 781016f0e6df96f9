"""Layouts of the TPU kernels: columns and rows of heads, and the order of positions in them.

Shape letters of this folder: B batch, N queries, M keys, H query heads, K key/value heads, D width of a head,
R = H * D rows of all heads' columns, L = 128 lanes, T tiles of L lanes, C column blocks of L queries, Bk keys of a
block. S and F are the paper's only. Indices: b sequence, g group of heads, i block of queries (r from the
last one on), j block of keys, c column block.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

LANES = 128


def to_columns(x_BNHD: Array, num_heads: int, width: int, block: int) -> Array:
    """[B, N, H, D] to columns [B, R, N], positions along lanes; N, H and D padded to what the kernel works on."""
    x_BHDN = pad(pad(pad(jnp.moveaxis(x_BNHD, 1, 3), num_heads, 1), width, 2), block, 3)
    return x_BHDN.reshape(x_BHDN.shape[0], -1, x_BHDN.shape[3])


def from_columns(x_BRN: Array, width: int, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_columns`; `shape` is [B, N, H, D]."""
    x_BHDN = x_BRN.reshape(shape[0], -1, width, x_BRN.shape[2])
    return jnp.moveaxis(x_BHDN[:, : shape[2], : shape[3], : shape[1]], 3, 1)


def pad(x: Array, multiple: int, axis: int, value: Any = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, round_up(x.shape[axis], multiple) - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Matmul of 2-D arrays over dimension `contract[0]` of a and `contract[1]` of b, float32, exact for its dtype."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def head_rows(head: int, width: int) -> slice:
    """Where a head lies in an array of [heads * width, 128] columns."""
    return slice(head * width, (head + 1) * width)


def lane_tile(head: int, width: int) -> int:
    """Which of the tiles of 128 lanes holds a head in an array of rows."""
    return head * width // LANES


def fill_lanes(x_DL: Array, head: int) -> Array:
    """A head's columns [D, 128] as the matmul partner [128, 128] of the lane tile that holds key/value head `head`.

    Two heads of width 64 share a lane tile; the other one meets zeros. The MXU contracts 128 rows in any case.
    """
    if x_DL.shape[0] == LANES:
        return x_DL
    zeros = jnp.zeros_like(x_DL)
    return jnp.concatenate([x_DL, zeros] if head % 2 == 0 else [zeros, x_DL], axis=0)


def row_to_column(row: Array) -> Array:
    """[1, L] along lanes to [L, 128] along sublanes, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def store_rows(rows_ref: Any, windows: Sequence[Any]) -> None:
    """Heads' columns [1, heads * D, 128] turned to rows [T, Bk, 128], heads side by side in T tiles of 128 lanes."""
    width = windows[0].shape[1]
    for tile in range(rows_ref.shape[0]):
        for block, columns_ref in enumerate(windows):
            x = columns_ref[0, tile * LANES : min((tile + 1) * LANES, width)]
            if x.shape[0] < LANES:  # an odd number of heads of width 64
                x = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
            rows_ref[tile, lanes(block)] = x.T


def shuffle(x: Array, axis: int) -> Array:
    """Positions in the order in which squares of S hold their queries, in every block of 128 along `axis`.

    Row 8 r + s holds query 16 s + r: a sum over queries is then a sum over registers, and only once over sublanes.
    """
    shape = (*x.shape[:axis], -1, 8, 16, *x.shape[axis + 1 :])
    return x.reshape(shape).swapaxes(axis + 1, axis + 2).reshape(x.shape)


def shuffle_lanes(x: Array) -> Array:
    """The same of 128 queries along lanes, inside a kernel."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.take_along_axis(x, (lane & 7) * 16 + (lane >> 3), axis=x.ndim - 1)


def unshuffle_lanes(x: Array) -> Array:
    """The inverse of `shuffle_lanes`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.take_along_axis(x, (lane & 15) * 8 + (lane >> 4), axis=x.ndim - 1)


def lanes(block: int) -> slice:
    """Positions of a block of 128."""
    return slice(block * LANES, (block + 1) * LANES)
