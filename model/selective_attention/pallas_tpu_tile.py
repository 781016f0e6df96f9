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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from .selection import Selection

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


def sum_before(x_LL: Array) -> Array:
    """For every row the sum of the rows before it: `sum_{t < s} x[t]`, in float32."""
    return _exclusive_sum(x_LL, 1)


def sum_after(x_LL: Array) -> Array:
    """For every row the sum of the rows after it."""
    return _exclusive_sum(x_LL, -1)


def _exclusive_sum(x_LL: Array, direction: int) -> Array:
    # In groups of 8 rows (one register): three steps of doubling distance inside the groups, then the groups' totals.
    # Pairwise at first and then blocked, so that rounding errors do not grow with the number of queries.
    grouped = x_LL.reshape(-1, 8, LANES)
    sublane = jax.lax.broadcasted_iota(jnp.int32, grouped.shape, 1)
    inclusive = grouped
    for distance in (1, 2, 4):
        inside = sublane >= distance if direction > 0 else sublane < 8 - distance
        inclusive += jnp.where(inside, pltpu.roll(inclusive, (direction * distance) % 8, 1), 0.0)
    last = slice(7, 8) if direction > 0 else slice(0, 1)
    total = jnp.broadcast_to(inclusive[:, last], grouped.shape)
    before: list[Array] = [jnp.zeros_like(total[0])]
    for group in range(len(total) - 1):
        before.append(before[-1] + total[group if direction > 0 else len(total) - 1 - group])
    return (inclusive - grouped + jnp.stack(before[::direction])).reshape(x_LL.shape)


class Tile:
    """F of one tile, square by square: 128 queries against 128 keys.

    A square of S is made with queries along sublanes, because sums over queries are cheap there, and turned at the end.
    With `diagonal` the tile is known to begin with the same query and key, and squares above the diagonal are left out.
    """

    def __init__(self, plan: Plan, refs: Any, first_query: Array, first_key: Array, diagonal: bool):
        self.plan, self.refs, self.diagonal = plan, refs, diagonal
        self.first_query, self.first_key = first_query, first_key
        self.sublane, self.lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
        self.carry: dict[int, Array] = {}  # [1, 128] per block of 128 keys: F at the next query

    def squares(self) -> list[tuple[int, int]]:
        """(column block, key block) of all squares, a key's squares in the order of queries."""
        blocks = range(self.plan.block_k // LANES)
        return [(c, k) for c in range(self.plan.columns) for k in blocks if k <= c or not self.diagonal]

    def start(self, row: Array) -> None:
        """Takes F at the tile's first query, [1, Bk]."""
        self.carry = {block: row[:, lanes(block)] for block in range(self.plan.block_k // LANES)}

    def logits(self, c: int, block: int) -> Array:
        """The selecting head's, without their factor."""
        return dot(self.refs.q_sel[0, lanes(c)], self.refs.k_sel[0, lanes(block)], (1, 1))

    def mask(self, c: int, block: int, logits: Array) -> tuple[Array, Array]:
        """F and the derivative of S by its logit; [128 queries, 128 keys] each."""
        selection = self.plan.selection
        allowed = self._in_order(c, block, 0 if selection is Selection.UNPROTECTED_SELF else 1)
        if self.plan.segments:
            allowed &= self._same_segment(c, block, self.refs.kv_select)
        elif selection is not Selection.UNPROTECTED_BOS:
            allowed &= self.lane + (self.first_key + block * LANES) > 0
        slope = jnp.where(logits > 0, 1.0, LEAKY_SLOPE if selection is Selection.LEAKY else 0.0)
        slope = jnp.where(allowed, slope, 0.0)
        s = logits * slope * (self.plan.scale * LOG2_E)
        f = self.carry[block] + sum_before(s)
        self.carry[block] = f[-1:] + s[-1:]
        return f, slope

    def hide(self, c: int, block: int, f: Array) -> Array:
        """F, or HIDDEN where attention does not look; turned to [128 keys, 128 queries]."""
        visible = self._in_order(c, block, 0)
        if self.plan.segments:
            visible &= self._same_segment(c, block, self.refs.kv_visible)
        if self.plan.evict:
            visible &= self.sublane + (self.first_query + c * LANES) < self.refs.evict_at[0, :, lanes(block)]
        return (f if visible is True else jnp.where(visible, f, HIDDEN)).T

    def _in_order(self, c: int, block: int, distance: int) -> Array | bool:
        """Whether the query comes at least `distance` after the key."""
        if self.diagonal:
            return True if block < c else self.sublane - self.lane >= distance
        return self.sublane - self.lane + (self.first_query - self.first_key + (c - block) * LANES) >= distance

    def _same_segment(self, c: int, block: int, keys: Any) -> Array:
        return row_to_column(self.refs.q_segment[0, :, lanes(c)]) == keys[0, :, lanes(block)]


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
