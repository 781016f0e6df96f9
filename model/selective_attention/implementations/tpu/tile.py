"""What the TPU kernels share: matmuls, the tile of F, and software pipelining.

A tile is a block of keys against a block of queries, and it is transposed: keys run along sublanes, queries along
lanes. So a head of width 64 fills the sublanes of its operands without waste, statistics of queries are rows that
broadcast for free, and every matmul with a head's width in its result streams 64 rows through the MXU instead of 128.
A tile is held as [C, Bk, 128], one column block of 128 queries after the other. Logits and F are in base 2: `log2(e)`
times their value.

Shape letters: B batch, N queries, M keys, H query heads, K key/value heads, D head width, S selecting width,
C column blocks of 128 queries, Bk keys of a block, L = 128 lanes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...selection import Selection

LANES = 128
LOG2_E = 1.4426950408889634
LEAKY_SLOPE = 0.01
HIDDEN = 1e30  # F of a pair that attention does not look at: exp2(logit - HIDDEN) is exactly 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape and rule of one attention call, after padding; everything that a kernel is specialised to."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # 64 or 128
    value_dim: int  # 64 or 128
    select_dim: int  # 64 or 128
    head_groups: int  # parts of the heads; each has its own pass over the grid, and computes F for itself
    block_q: int
    block_k: int
    backward_block: int  # block_q and block_k of the backward kernel
    vmem: int  # bytes that a kernel may take
    scale: float
    selection: Selection
    tau: float | None
    segments: bool
    evict: bool

    @property
    def group_heads(self) -> int:
        return self.num_heads // self.head_groups

    @property
    def group_kv_heads(self) -> int:
        return self.num_kv_heads // self.head_groups

    @property
    def columns(self) -> int:
        return self.block_q // LANES

    def kv_head(self, head: int) -> int:
        """The key/value head, within the group, that a query head of the group reads."""
        return head * self.num_kv_heads // self.num_heads

    def last_block_k(self, block_q_index: Array | int, offset: Array | int) -> Array:
        """Index of the last block of keys that a block of queries sees anything of."""
        return jax.lax.div(offset + (block_q_index + 1) * self.block_q - 1, self.block_k)

    def first_block_q(self, block_k_index: Array | int, offset: Array | int) -> Array:
        """Index of the first block of queries that sees anything of a block of keys."""
        return jax.lax.div(jnp.maximum(block_k_index * self.block_k - offset, 0), self.block_q)


def to_columns(x_BNHD: Array, num_heads: int, width: int, block: int) -> Array:
    """[B, N, H, D] to columns [B, H * D, N], positions along lanes; N, H and D padded to what the kernel works on."""
    x_BHDN = pad(pad(pad(jnp.moveaxis(x_BNHD, 1, 3), num_heads, 1), width, 2), block, 3)
    return x_BHDN.reshape(x_BHDN.shape[0], -1, x_BHDN.shape[3])


def from_columns(x_BCN: Array, width: int, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_columns`; `shape` is [B, N, H, D]."""
    x_BHDN = x_BCN.reshape(shape[0], -1, width, x_BCN.shape[2])
    return jnp.moveaxis(x_BHDN[:, : shape[2], : shape[3], : shape[1]], 3, 1)


def pad(x: Array, multiple: int, axis: int, value: Any = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, round_up(x.shape[axis], multiple) - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def on_platform(kernel, operands, scalars):
    """Compiled on TPU, interpreted elsewhere: decided by the platform that is lowered for, not by where this runs."""
    return jax.lax.platform_dependent(
        operands,
        scalars,
        tpu=functools.partial(kernel, interpret=False),
        default=functools.partial(kernel, interpret=True),
    )


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


def column_windows(block: int, rows: int, index: Callable[..., tuple[Any, Any, Any]]) -> tuple[pl.BlockSpec, ...]:
    """Windows on a block of positions of an input [B, rows, N], one for every 128; `index` is the whole block's.

    In HBM bfloat16 is tiled by 8 rows of 128 lanes, and a register holds 16 rows. In a window of 128 lanes two such
    tiles follow each other and are loaded at once; a wider one would take a load for each.
    """
    count = block // LANES

    def window(n: int) -> pl.BlockSpec:
        def nth(*grid):
            batch, group, whole = index(*grid)
            return batch, group, whole * count + n

        return pl.BlockSpec((1, rows, LANES), nth)

    return tuple(window(n) for n in range(count))


def windowed(operands: dict[str, Array], specs: dict[str, Any]) -> list[Any]:
    """The operands, each as often as it has windows."""
    return [jax.tree.map(lambda _, x=x: x, specs[name], is_leaf=_is_window) for name, x in operands.items()]


def _is_window(x: Any) -> bool:
    return isinstance(x, pl.BlockSpec)


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


def sum_before(x_LL: Array) -> tuple[Array, Array]:
    """For every row of shuffled queries the sum over earlier queries, and the sum over all [1, 128]. In float32."""
    return _exclusive_sum(x_LL, range(16), lambda sublane, distance: sublane >= distance, 1)


def sum_after(x_LL: Array) -> tuple[Array, Array]:
    """The same over all later queries."""
    return _exclusive_sum(x_LL, range(15, -1, -1), lambda sublane, distance: sublane < 8 - distance, -1)


def _exclusive_sum(x_LL: Array, order: Sequence[int], inside: Callable[[Array, int], Array], direction: int):
    # Blocked: 16 within a run of queries, the 8 runs pairwise. So rounding errors do not grow with their number.
    within: dict[int, Array] = {}
    run = jnp.zeros((8, LANES), jnp.float32)
    for register in order:
        within[register] = run
        run += x_LL[8 * register : 8 * register + 8]
    sublane = jax.lax.broadcasted_iota(jnp.int32, run.shape, 0)
    inclusive = run
    for distance in (1, 2, 4):
        shifted = pltpu.roll(inclusive, (direction * distance) % 8, 0)
        inclusive += jnp.where(inside(sublane, distance), shifted, 0.0)
    others = inclusive - run
    return jnp.concatenate([within[n] + others for n in range(16)], axis=0), jnp.sum(run, axis=0, keepdims=True)


class Tile:
    """F of one tile, square by square: 128 queries against 128 keys.

    A square of S is made with (shuffled) queries along sublanes, because sums over queries are cheap there, and turned
    at the end. With `diagonal` the tile is known to begin with the same query and key, and squares above the diagonal
    are left out.
    """

    def __init__(self, plan: Plan, refs: Any, first_query: Array, first_key: Array, diagonal: bool):
        self.plan, self.refs, self.diagonal = plan, refs, diagonal
        self.first_query, self.first_key = first_query, first_key
        row, self.key = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
        self.query = (row & 7) * 16 + (row >> 3)
        self.carry: dict[int, Array] = {}  # [1, 128] per block of 128 keys: F at the next query

    def squares(self) -> list[tuple[int, int]]:
        """(column block, key block) of all squares, a key's squares in the order of queries."""
        blocks = range(self.plan.block_k // LANES)
        return [(c, k) for c in range(self.plan.columns) for k in blocks if k <= c or not self.diagonal]

    def start(self, row: Array) -> None:
        """Takes F at the tile's first query, [1, Bk]."""
        self.carry = {block: row[:, lanes(block)] for block in range(self.plan.block_k // LANES)}

    def select(self, c: int, block: int) -> Array:
        """S in base 2, [128 shuffled queries, 128 keys]."""
        logits = dot(self.refs.q_sel_rows[lanes(c)], self.refs.k_sel[block][0], (1, 0))
        logits *= self.plan.scale * LOG2_E
        leaky = self.plan.selection is Selection.LEAKY
        s = jnp.where(logits > 0, logits, LEAKY_SLOPE * logits) if leaky else jnp.maximum(logits, 0.0)
        allowed = self._in_order(c, block, 0 if self.plan.selection is Selection.UNPROTECTED_SELF else 1)
        if self.plan.segments:
            allowed &= self._same_segment(c, block)
        return s if allowed is True else jnp.where(allowed, s, 0.0)

    def mask(self, block: int, s: Array) -> Array:
        """F, [128 shuffled queries, 128 keys]; moves the keys' carry on."""
        before, total = sum_before(s)
        f = self.carry[block] + before
        self.carry[block] += total
        return f

    def hide(self, c: int, block: int, f: Array) -> Array:
        """F, or HIDDEN where attention does not look; turned to [128 keys, 128 queries]."""
        visible = self._in_order(c, block, 0)
        if self.plan.segments:
            visible &= self._same_segment(c, block)
        if self.plan.evict:
            visible &= self.query + (self.first_query + c * LANES) < self.refs.evict_at[0, :, lanes(block)]
        return unshuffle_lanes((f if visible is True else jnp.where(visible, f, HIDDEN)).T)

    def turn(self, x: Array) -> Array:
        """[128 keys, 128 queries] to [128 shuffled queries, 128 keys]."""
        return shuffle_lanes(x).T

    def _in_order(self, c: int, block: int, distance: int) -> Array | bool:
        """Whether the query comes at least `distance` after the key."""
        if self.diagonal:
            return True if block < c else self.query - self.key >= distance
        return self.query - self.key + (self.first_query - self.first_key + (c - block) * LANES) >= distance

    def _same_segment(self, c: int, block: int) -> Array:
        return row_to_column(self.refs.q_segment[0, :, lanes(c)]) == self.refs.kv_segment[0, :, lanes(block)]


def lanes(block: int) -> slice:
    """Positions of a block of 128."""
    return slice(block * LANES, (block + 1) * LANES)


def software_pipeline(
    units: Sequence[Any],
    stages: Sequence[Callable[..., Any]],
    delays: Sequence[int],
    chores: Sequence[tuple[int, Callable[[], None]]] = (),
) -> None:
    """Runs stage n of every unit on what stage n - 1 made of it, `delays[n]` units after the unit's first stage.

    The compiler schedules bundles more or less in program order. With the stages of one unit behind each other, the
    vector unit waits for the MXU and the MXU for the vector unit; interleaved with other units, both are busy. A chore
    (step, run) runs before the first stage of unit number `step`.
    """
    made: dict[tuple[int, int], Any] = {}
    waiting = sorted(chores, key=lambda chore: chore[0])
    for step in range(len(units) + max(delays)):
        while waiting and waiting[0][0] <= step:
            waiting.pop(0)[1]()
        for n, (stage, delay) in enumerate(zip(stages, delays, strict=True)):
            t = step - delay
            if 0 <= t < len(units):
                made[n, t] = stage(units[t], *([made.pop((n - 1, t))] if n else []))
    for _, run in waiting:
        run()
