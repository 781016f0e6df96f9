"""F of a tile, which both TPU kernels make.

A tile is a block of keys against a block of queries, and it is transposed: keys run along sublanes, queries along
lanes. So a head of width 64 fills the sublanes of its operands without waste, statistics of queries are rows that
broadcast for free, and every matmul with a head's width in its result streams 64 rows through the MXU instead of 128.
A tile is held as [C, Bk, L], one column block of 128 queries after the other. Logits and F are in base 2: `log2(e)`
times their value.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from ...selection import HIDDEN, LEAKY_SLOPE, Selection
from .columns import LANES, dot, lanes, row_to_column, shuffle_lanes, unshuffle_lanes
from .pipeline import Line
from .plan import KernelPlan

LOG2_E = 1.4426950408889634


class Square(NamedTuple):
    """128 queries against 128 keys of a tile."""

    queries: int  # which column block
    keys: int  # which 128 keys of the block

    @property
    def at(self) -> tuple[int, slice]:
        """Where it lies in an array [C, Bk, L]."""
        return self.queries, lanes(self.keys)


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


def selecting_columns(plan: KernelPlan, refs: Any, column_block: int) -> Array:
    """q of the selecting head [D', 128], which has a window of its own or is the first of all heads."""
    if hasattr(refs, "q_sel"):
        return refs.q_sel[column_block][0]
    return refs.q[column_block][0, : plan.select_dim]


class Tile:
    """F of one tile, square by square.

    A square of S is made with (shuffled) queries along sublanes, because sums over queries are cheap there, and turned
    at the end. With `diagonal` the tile is known to begin with the same query and key, and squares above the diagonal
    are left out.
    """

    def __init__(
        self,
        plan: KernelPlan,
        refs: Any,
        first_query: Array,
        first_key: Array,
        diagonal: bool,
        parts: Sequence[int] | None = None,
    ):
        self.plan, self.refs, self.diagonal = plan, refs, diagonal
        self.first_query, self.first_key = first_query, first_key
        self.parts = range(plan.parts) if parts is None else parts  # the blocks of 128 keys that are worked on
        row, self.key = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
        self.query = (row & 7) * 16 + (row >> 3)
        self.segments = hasattr(refs, "q_segment")
        self.carry: dict[int, Array] = {}  # [1, 128] per block of 128 keys: F at the next query

    def squares(self) -> list[Square]:
        """All that are worked on, a key's squares in the order of queries."""
        every = [Square(c, k) for c in range(self.plan.columns) for k in self.parts]
        return [square for square in every if square.keys <= square.queries or not self.diagonal]

    def mask_chores(self, needed: dict[Square, int], leads: Sequence[int], *stages: Callable[..., Any]) -> list[Line]:
        """The stages select, mask and store of every square, `leads` steps before that at which its F is `needed`."""
        if not self.plan.selects:
            stages, leads = (lambda _: jnp.zeros((LANES, LANES), jnp.float32), stages[2]), (leads[2], leads[2])
        return [Line(square, stages, [step - lead for lead in leads]) for square, step in needed.items()]

    def start(self, row: Array) -> None:
        """Takes F at the tile's first query, [1, Bk]."""
        self.carry = {part: row[:, lanes(part)] for part in self.parts}

    def select(self, square: Square) -> Array:
        """S in base 2, [128 shuffled queries, 128 keys]."""
        logits = dot(self.refs.q_sel_rows[lanes(square.queries)], self.refs.k_sel[square.keys][0], (1, 0))
        logits *= self.plan.scale * LOG2_E
        leaky = self.plan.selection is Selection.LEAKY
        s = jnp.where(logits > 0, logits, LEAKY_SLOPE * logits) if leaky else jnp.maximum(logits, 0.0)
        allowed = self._in_order(square, 0 if self.plan.selection is Selection.UNPROTECTED_SELF else 1)
        if self.segments:
            allowed &= self._same_segment(square)
        return s if allowed is True else jnp.where(allowed, s, 0.0)

    def mask(self, square: Square, s: Array) -> Array:
        """F, [128 shuffled queries, 128 keys]; moves the keys' carry on."""
        before, total = sum_before(s)
        f = self.carry[square.keys] + before
        self.carry[square.keys] += total
        return f

    def hide(self, square: Square, f: Array) -> Array:
        """F, or HIDDEN where attention does not look; turned to [128 keys, 128 queries]."""
        visible = self._in_order(square, 0)
        if self.segments:
            visible &= self._same_segment(square)
        if self.plan.evict:
            position = self.query + (self.first_query + square.queries * LANES)
            visible &= position < self.refs.evict_at[0, :, lanes(square.keys)]
        return unshuffle_lanes((f if visible is True else jnp.where(visible, f, HIDDEN)).T)

    def turn(self, x: Array) -> Array:
        """[128 keys, 128 queries] to [128 shuffled queries, 128 keys]."""
        return shuffle_lanes(x).T

    def _in_order(self, square: Square, distance: int) -> Array | bool:
        """Whether the query comes at least `distance` after the key."""
        if self.diagonal:
            return True if square.keys < square.queries else self.query - self.key >= distance
        apart = self.query - self.key
        return apart + (self.first_query - self.first_key + (square.queries - square.keys) * LANES) >= distance

    def _same_segment(self, square: Square) -> Array:
        q_segment = row_to_column(self.refs.q_segment[0, :, lanes(square.queries)])
        return q_segment == self.refs.kv_segment[0, :, lanes(square.keys)]
