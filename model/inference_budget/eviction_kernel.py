"""Eviction times as one TPU kernel, for policies that judge by F alone or by what a token is when it comes.

Grid: (groups of up to 8 sequences, 1, query block i, key block j). Groups are what the two cores of a chip share out; i
and j run in order. Of a group, sequences run along sublanes and columns along lanes: a step takes all of its sequences
at once, and its two reductions over lanes, for whose results it has to wait, once. At every j the kernel makes S of the
block's queries and leaves it in VMEM; at the last one it steps through the queries.

A column's priority and when it left are one float32: bits from those of EVICTED on, as many as the column of the query
that it left before, say that it is gone, and -inf that it never leaves or is not here yet. Whatever S adds to them,
both stay what they are.

On other platforms the kernel is interpreted, slowly. Shape letters: README.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from selective_attention.implementations.tpu.columns import LANES, dot, lanes, pad, round_up
from selective_attention.implementations.tpu.plan import tiling_here
from selective_attention.implementations.tpu.program import Program, Result, Window, on_platform
from selective_attention.selection import Rule, Selection, rectified

ROWS = 8  # sublanes of a register
QUERIES = (128, 64, 32, 16)  # of a block: the first of which S fits into half of VMEM
MOST_COLUMNS = 16_384  # of which S of 16 queries does on every TPU
MOST_KEYS = 512  # of a block
HALF_TILE = 64  # to whose multiple the selecting head is padded
EVICTED = -0x0E80_0000  # int32, of the bits of -2**100: lower than any F, and 23 more bits for a column
NOBODY = 2.0**30  # beyond all positions
NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static shape of one call, after padding."""

    rule: Rule
    selects: bool
    num_held: int
    num_queries: int
    groups: int
    rows: int  # sequences of a group
    block_q: int
    block_k: int
    blocks_k: int

    @property
    def num_columns(self) -> int:
        return self.blocks_k * self.block_k

    def in_groups(self, x: Array, value: Any = 0) -> Array:
        """[B, ...] to [groups * 8, ...], with `value` where a group has no sequence."""
        grouped = pad(x, self.groups * self.rows, 0, value).reshape(self.groups, self.rows, *x.shape[1:])
        return pad(grouped, ROWS, 1, value).reshape(self.groups * ROWS, *x.shape[1:])

    def rows_of(self, x: Array, value: Any) -> Array:
        """[B, M] to [groups * 8, columns]."""
        return self.in_groups(pad(x, self.num_columns, 1, value), value)

    def last_block_k(self, i: Any) -> Any:
        """The last block of keys that queries of block i see."""
        return jnp.minimum((self.num_held + (i + 1) * self.block_q - 1) // self.block_k, self.blocks_k - 1)


def times(
    rule: Rule,
    start: Array,
    position: Array,
    selecting: tuple[Array, Array] | None,
    from_query: Array,
    num_queries: Array,
    length: int,
) -> tuple[Array, Array]:
    """When each column leaves: of those that are here the one with the largest priority, the oldest among equals.

    Args:
      rule: of S.
      start: float32 [B, M], priorities before the first query, or, of the last `length` columns, when they arrive;
        -inf for what never leaves.
      position: int32 [B, M], of each column's token.
      selecting: q_sel [B, T, D] and k_sel [B, M, D], whose S each query adds to the priorities; None to add nothing.
      from_query, num_queries: int32 [B]; in which of the queries each row evicts: from the one to before the other.
        Those from the latter on add nothing.
      length: T, queries; the last T columns are theirs.

    Returns:
      The column index of the query from which on each column is hidden, int32 [B, M], NEVER for what stays; and the
      priorities afterwards, float32 [B, M], 0 for what is gone or never leaves.
    """
    batch, num_columns = position.shape
    plan = _make_plan(rule, selecting is not None, batch, num_columns, length)
    operands = {
        "start": plan.rows_of(start.astype(jnp.float32), -jnp.inf),
        "position": plan.rows_of(position, -1).astype(jnp.float32),
        "from_query": jnp.broadcast_to(plan.in_groups(from_query)[:, None], (plan.groups * ROWS, LANES)),
        "num_queries": jnp.broadcast_to(plan.in_groups(num_queries)[:, None], (plan.groups * ROWS, LANES)),
    }
    if selecting is not None:
        real_BT = jnp.arange(length) < num_queries[:, None]
        q_sel, k_sel = (
            # Positions along lanes, as the attention kernels want them, so that q and k are laid out once for both.
            pad(pad(jnp.swapaxes(jnp.where(there[..., None], x, 0), 1, 2), plan.groups * plan.rows, 0), HALF_TILE, 1)
            for x, there in zip(selecting, (real_BT, position >= 0), strict=True)
        )
        operands |= {"q_sel": pad(q_sel, LANES, 2), "k_sel": pad(k_sel, plan.num_columns, 2)}
    first = jnp.where(from_query < num_queries, from_query, length)
    scalars = (
        plan.in_groups(first, length).reshape(plan.groups, ROWS).min(1),
        plan.in_groups(num_queries).reshape(plan.groups, ROWS).max(1),
    )
    made = on_platform(functools.partial(_run, plan), operands, scalars)
    evict_at, priority = (
        made[name].reshape(plan.groups, ROWS, -1)[:, : plan.rows].reshape(-1, plan.num_columns)[:batch, :num_columns]
        for name in ("evict_at", "priority")
    )
    return evict_at, priority


def _make_plan(rule: Rule, selects: bool, batch: int, num_columns: int, length: int) -> _Plan:
    groups = -(-batch // ROWS) if batch > ROWS else min(batch, 2)  # work for two cores
    padded = round_up(num_columns, LANES)
    queries = next(n for n in QUERIES if n * ROWS * padded * 4 <= tiling_here().vmem // 2)
    block_q = min(queries, max(QUERIES[-1], 1 << (length - 1).bit_length()))
    block_k = math.gcd(padded, MOST_KEYS)
    return _Plan(
        rule=rule,
        selects=selects,
        num_held=num_columns - length,
        num_queries=round_up(length, block_q),
        groups=groups,
        rows=-(-batch // groups),
        block_q=block_q,
        block_k=block_k,
        blocks_k=padded // block_k,
    )


def _run(plan: _Plan, operands: dict[str, Array], scalars: tuple[Array, Array], interpret: bool) -> dict[str, Array]:
    row = pl.BlockSpec((ROWS, plan.num_columns), lambda g, _, i, j, *scalars: (g, 0))
    lane = pl.BlockSpec((ROWS, LANES), lambda g, _, i, j, *scalars: (g, 0))

    def key_block(g, _, i, j, *scalars):
        return g, 0, jnp.minimum(j, plan.last_block_k(i))

    windows: dict[str, Window] = {
        "start": row,
        "position": row,
        "from_query": lane,
        "num_queries": lane,
    }
    if plan.selects:
        width, parts = operands["q_sel"].shape[1], LANES // plan.block_q
        windows["q_sel"] = pl.BlockSpec((plan.rows, width, LANES), lambda g, _, i, j, *scalars: (g, 0, i // parts))
        windows["k_sel"] = pl.BlockSpec((plan.rows, width, plan.block_k), key_block)
    shape = operands["start"].shape
    results = {
        "evict_at": Result(row, jax.ShapeDtypeStruct(shape, jnp.int32)),
        "priority": Result(row, jax.ShapeDtypeStruct(shape, jnp.float32)),
    }
    scratch = {"now": pltpu.VMEM((ROWS, plan.num_columns), jnp.float32)}
    if plan.selects:
        scratch["q_sel_rows"] = pltpu.VMEM((plan.rows, LANES, width), operands["q_sel"].dtype)
        scratch["s"] = pltpu.VMEM((plan.num_columns // LANES, plan.block_q * ROWS, LANES), jnp.float32)
    grid = plan.groups, 1, plan.num_queries // plan.block_q, plan.blocks_k
    program = Program("eviction_times", grid, windows, results, scratch)
    return program.run(functools.partial(_kernel, plan), scalars, operands, tiling_here().vmem, interpret)


def _kernel(plan: _Plan, from_query_ref, num_queries_ref, ref) -> None:
    g, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first_query = i * plan.block_q
    from_query, num_queries = from_query_ref[g], num_queries_ref[g]
    some = first_query < num_queries
    column = jax.lax.broadcasted_iota(jnp.int32, (ROWS, plan.num_columns), 1)

    @pl.when((i == 0) & (j == 0))
    def _start():
        ref.now[...] = jnp.where(column < plan.num_held, ref.start[...], -jnp.inf)
        if plan.selects:
            ref.s[...] = jnp.zeros_like(ref.s)

    if plan.selects:

        @pl.when((j == 0) & (first_query % LANES == 0))
        def _turn_queries():
            for row in range(plan.rows):
                ref.q_sel_rows[row] = ref.q_sel[row].T

        @pl.when(some & (j <= plan.last_block_k(i)))
        def _select():
            _make_s(plan, ref, first_query, j)

    last = j == plan.blocks_k - 1

    @pl.when(last & some & (first_query + plan.block_q <= from_query))
    def _fill():
        _steps(plan, ref, first_query, column, evicting=False)

    @pl.when(last & some & (first_query + plan.block_q > from_query))
    def _evict():
        _steps(plan, ref, first_query, column, evicting=True)

    @pl.when(last & (i == pl.num_programs(2) - 1))
    def _end():
        now = ref.now[...]
        gone = (now <= -(2.0**100)) & (now > -jnp.inf)
        bits = jax.lax.bitcast_convert_type(now, jnp.int32)
        ref.evict_at[...] = jnp.where(gone, bits - EVICTED, NEVER)
        ref.priority[...] = jnp.where(now <= -(2.0**100), 0.0, now)


def _make_s(plan: _Plan, ref, first_query, j) -> None:
    """S of a block of queries and one of keys, a query's sequences one below the other."""
    apart = jax.lax.broadcasted_iota(jnp.int32, (plan.block_q, LANES), 0)
    apart = apart - jax.lax.broadcasted_iota(jnp.int32, (plan.block_q, LANES), 1)
    distance = 0 if plan.rule.selection is Selection.UNPROTECTED_SELF else 1
    part = pl.ds(pl.multiple_of(first_query % LANES, plan.block_q), plan.block_q)
    for row in range(plan.rows):
        for n in range(plan.block_k // LANES):
            first_key = j * plan.block_k + n * LANES
            keys = ref.k_sel[row, :, lanes(n)]
            logits = dot(ref.q_sel_rows[row, part], keys, (1, 0)) * plan.rule.scale
            earlier = apart >= first_key - first_query - plan.num_held + distance
            s = jnp.where(earlier, rectified(logits, plan.rule.selection), 0.0)
            ref.s[j * (plan.block_k // LANES) + n, pl.ds(row, plan.block_q, stride=ROWS), :] = s


def _steps(plan: _Plan, ref, first_query, column, *, evicting: bool) -> None:
    """Takes in a block of queries, one after the other."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    chunks = [lanes(c) for c in range(plan.num_columns // LANES)]

    def step(n, now):
        t = first_query + n
        at = plan.num_held + t
        if evicting:
            most = jnp.max(_folded(jnp.maximum, now), axis=1, keepdims=True)
            best = [jnp.where(x == most, ref.position[:, c], NOBODY) for x, c in zip(now, chunks, strict=True)]
            who = jnp.min(_folded(jnp.minimum, best), axis=1, keepdims=True)
            # All lanes of a register, so that nothing has to be spread over them.
            evicts = (ref.from_query[...] <= t) & (t < ref.num_queries[...])
            who = jnp.where(evicts, jnp.broadcast_to(who, lane.shape), -1.0)
            left = jax.lax.bitcast_convert_type(jnp.full(lane.shape, EVICTED + at, jnp.int32), jnp.float32)
            now = [jnp.where(ref.position[:, c] == who, left, x) for x, c in zip(now, chunks, strict=True)]
        now = [jnp.where(lane == at - c.start, ref.start[:, c], x) for x, c in zip(now, chunks, strict=True)]
        if plan.selects:
            rows = pl.ds(pl.multiple_of(n * ROWS, ROWS), ROWS)
            now = [x + ref.s[c, rows, :] for c, x in enumerate(now)]
        return tuple(now)

    now = jax.lax.fori_loop(0, plan.block_q, step, tuple(ref.now[:, c] for c in chunks))
    for c, x in zip(chunks, now, strict=True):
        ref.now[:, c] = x


def _folded(function: Callable[[Array, Array], Array], parts: Sequence[Array]) -> Array:
    """Pairwise, so that few steps wait for each other."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [function(*pair) for pair in pairs] + list(parts[len(parts) // 2 * 2 :])
    return parts[0]
