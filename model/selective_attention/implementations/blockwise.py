"""Selective attention in blocks of queries and keys, with `jax.custom_vjp`: nothing of size N x M ever exists.

Forward: for query blocks in order and, inside, for the key blocks up to the diagonal, `_mask_tile` makes a tile of F
from its carry (a vector f [M], F at the block's first query) and advances the carry; softmax is accumulated online.
Backward, in reverse order: the tile of F is made again from the saved carry, and the transpose of `_mask_tile` takes
the gradients of F and of the later carry to the selecting head's q and k and to the earlier carry.
Between the two live the inputs, the outputs, their log-sum-exp, and the carries [B, N / R, M].
On a CPU, where each sequence has its own loops, keys that are forgotten for good are dropped on the way (`living.py`).

Shape letters: the package's; R rows (queries) and C columns (keys) of a tile, I query blocks of R, J key blocks of C.
What a single sequence passes through has no B.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..remat import keep
from ..selection import (
    HIDDEN,
    NOTHING_SEEN,
    Keys,
    Projections,
    Queries,
    Rule,
    Seen,
    Selection,
    select,
    selected,
    visible,
)
from .living import Layout, dropped, filled, of_keys, reach, shortened, unfolded

BLOCK = 128  # rows and columns of a tile, at most
GROUP = 16  # rows that are summed by one small matmul; blocks are multiples of it


class _Blocks(NamedTuple):
    """The inputs in blocks; a leading axis B, absent for a single sequence."""

    q: Array  # [I, K, G, R, D]
    k: Array  # [J, K, C, D]
    v: Array  # [J, K, C, D]
    q_sel: Array | None  # [I, R, D], float32; None, as k_sel, where head 0's logits select, or nothing does
    k_sel: Array | None  # [J, C, D], float32
    f_start: Array  # [J, C], float32
    q_segment: Array | None  # [I, R]
    kv_segment: Array | None  # [J, C]
    first: Array  # [J, C], as in Keys
    evict_at: Array | None  # [J, C]
    reach: Array | None  # [], float32: the F above which keys are forgotten for good; None: all are kept

    def keys_and_values(self) -> tuple[Array, Array, Array | None]:
        return self.k, self.v, self.k_sel

    def layout(self) -> Layout | None:
        """Of the sequence, if keys are dropped from it at all."""
        positions_JC = _positions(*self.first.shape)
        return None if self.reach is None else Layout.of_sequence(positions_JC, like=self.f_start)

    def keys(self, j: Array, layout: Layout | None) -> Keys:
        if layout is None:
            columns = self.first.shape[1]
            position_C = j * columns + jnp.arange(columns, dtype=jnp.int32)
        else:
            position_C = layout.position[j]

        def of(x_JC: Array) -> Array:
            return x_JC[j] if layout is None else of_keys(x_JC, position_C)

        segment, evict_at = (None if x is None else of(x) for x in (self.kv_segment, self.evict_at))
        return Keys(position_C, of(self.first), segment, evict_at)


def attend(projections: Projections, f_start: Array, seen: Seen, rule: Rule) -> tuple[Array, Array | None]:
    """Selective attention of a block of queries; arguments and results as `reference.attend`."""
    q, k, v = projections[:3]
    batch, length, num_heads, head_dim = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    selecting: tuple[Array | None, Array | None] = None, None
    if rule.selection is not Selection.OFF and (projections.q_sel is not None or q.dtype != dtype):
        q_sel, k_sel = projections.selecting()
        selecting = _split(q_sel.astype(dtype)), _split(k_sel.astype(dtype))
    first = jnp.broadcast_to(seen.keys(k.shape[1]).first, k.shape[:2])
    q_segment, kv_segment, evict_at = jax.tree.map(_split, (seen.q_segment_ids, seen.kv_segment_ids, seen.evict_at))
    blocks = _Blocks(
        q=jnp.einsum("birkgd->bikgrd", _split(q.reshape(batch, length, k.shape[2], -1, head_dim))),
        k=jnp.einsum("bjckd->bjkcd", _split(k)),
        v=jnp.einsum("bjckd->bjkcd", _split(v)),
        q_sel=selecting[0],
        k_sel=selecting[1],
        f_start=_split(f_start.astype(dtype)),
        q_segment=q_segment,
        kv_segment=kv_segment,
        first=_split(first),
        evict_at=evict_at,
        reach=reach(projections, seen, rule) if _one_by_one() and k.shape[1] > 2 * BLOCK else None,
    )
    offset, blocks = _vary_alike((jnp.asarray(seen.offset, jnp.int32), blocks))
    # The rule is fixed when the program is traced; a bound of the logits, now in `reach`, may not be.
    out_BIKGRD, forgotten_BIR = _attend(dataclasses.replace(rule, logit_bound=None), offset, blocks)
    out = _join(jnp.einsum("bikgrd->birkgd", out_BIKGRD), length).reshape(batch, length, num_heads, v.shape[-1])
    return out, None if rule.tau is None else _join(forgotten_BIR, length)


def column_sums(q_sel: Array, k_sel: Array, seen: Seen, rule: Rule) -> Array:
    """What a block of queries adds to F for all later queries; arguments and results as `reference.column_sums`."""
    dtype, segment_ids = jnp.promote_types(q_sel.dtype, jnp.float32), seen.q_segment_ids
    keys = dataclasses.replace(seen, evict_at=None).keys(k_sel.shape[1])
    q_sel, segment_ids, k_sel, keys = _vary_alike((q_sel.astype(dtype), segment_ids, k_sel.astype(dtype), keys))

    @jax.checkpoint  # S is made again in the backward pass
    def add_block(sums_BM, block):
        position_R, q_sel_BRD, segment_BR = block
        queries = Queries(seen.offset + position_R, segment_BR)
        return sums_BM + select(q_sel_BRD, k_sel, queries, keys, rule).sum(axis=1), None

    by_block = jax.tree.map(lambda x: jnp.moveaxis(_split(x), 1, 0), (q_sel, segment_ids))
    positions_IR = _positions(by_block[0].shape[0], by_block[0].shape[2])
    return jax.lax.scan(add_block, _zeros(k_sel.shape[:2], like=k_sel), (positions_IR, *by_block))[0]


def _mask_tile(logits_RC: Array, f_C: Array, queries: Queries, keys: Keys, rule: Rule) -> tuple[Array, Array]:
    """A tile of F [R, C] from the selecting logits and the carry f, F at its first row; and the carry for the row after
    its last.
    """
    rows, columns = logits_RC.shape
    if rule.selection is Selection.OFF:
        return jnp.zeros((rows, columns), f_C.dtype), f_C
    s_RC = selected(logits_RC, queries, keys, rule)
    # The exclusive sum over rows: within groups of rows, and over the groups before. Small triangular matmuls, in full
    # precision, are the fastest form of it.
    s_grouped = s_RC.reshape(-1, GROUP, columns)
    total = s_grouped.sum(axis=1)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    within = dot("rs,gsc->grc", jnp.tri(GROUP, k=-1, dtype=s_RC.dtype), s_grouped)
    before = dot("gh,hc->gc", jnp.tri(total.shape[0], k=-1, dtype=s_RC.dtype), total)
    f_RC = (f_C + before[:, None, :] + within).reshape(rows, columns)
    return f_RC, f_C + total.sum(axis=0)


def _logits(
    rule: Rule, q_KGRD: Array, k_KCD: Array, q_sel_RD: Array | None, k_sel_CD: Array | None, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Logits [K, G, R, C], and the selecting ones [R, C]."""
    dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
    logits_KGRC = rule.scale * dot("kgrd,kcd->kgrc", q_KGRD, k_KCD)
    if q_sel_RD is None or k_sel_CD is None:
        return logits_KGRC, logits_KGRC[0, 0]
    return logits_KGRC, rule.scale * dot("rd,cd->rc", q_sel_RD, k_sel_CD)


def _blocks_until(queries: Queries, blocks: _Blocks, layout: Layout | None) -> Array:
    """How many key blocks are not wholly above the diagonal of a block of queries."""
    num_blocks, columns = blocks.first.shape
    until = jnp.minimum(num_blocks, queries.position[-1] // columns + 1)
    return until if layout is None else layout.num_blocks(until)


class _Carry(NamedTuple):
    """What a block of queries leaves to the next."""

    f: Array  # [J, C], F at the next block's first query
    held: tuple[Array, Array, Array | None]  # k, v and k_sel of the living keys
    layout: Layout | None  # of both; None: as in the sequence


def _drop_forgotten(rule: Rule, blocks: _Blocks, queries: Queries, remaining: Array, carry: _Carry) -> _Carry:
    """The carry without keys that none of the `remaining` blocks of queries can tell from absent ones, if that pays."""
    f_JC, held, layout = carry
    if layout is None or blocks.reach is None:
        return carry
    dead_JC = f_JC > blocks.reach
    if queries.segment is not None and blocks.kv_segment is not None:
        dead_JC |= of_keys(blocks.kv_segment, layout.position) != queries.segment[0]
    if blocks.evict_at is not None:
        dead_JC |= of_keys(blocks.evict_at, layout.position) <= queries.position[0]
    earlier = queries.position[0] // f_JC.shape[1]
    layout, f_JC, first = shortened(layout, f_JC, dead_JC, earlier, remaining)
    return _Carry(f_JC, filled(held, blocks.keys_and_values(), layout, first), layout)


def _attend_sequence(rule: Rule, offset: Array, blocks: _Blocks):
    """Forward pass of one sequence: out [I, K, G, R, D], forgotten [I, R], log-sum-exp [I, K, G, R], f [I, J, C], and
    the layout [I, ...] of f if forgotten keys are dropped.
    """
    dtype = blocks.f_start.dtype
    num_blocks, heads, rows = blocks.q.shape[0], blocks.q.shape[1:4], blocks.q.shape[3]
    zeros = functools.partial(_zeros, like=blocks.f_start)

    def query_block(carry, block):
        position_R, q_KGRD, q_sel_RD, segment_R = block
        queries = Queries(offset + position_R, segment_R)
        carry = _drop_forgotten(rule, blocks, queries, num_blocks - position_R[0] // rows, carry)
        (k, v, k_sel), layout = carry.held, carry.layout
        forgotten_R = zeros((rows,))
        if rule.tau is not None and layout is not None and rule.selection is not Selection.OFF:
            forgotten_R += dropped(layout, queries, blocks.kv_segment)

        def key_block(n, made):
            top_KGR, total_KGR, out_KGRD, forgotten_R, f_JC = made
            j = n if layout is None else layout.block(n)
            keys = blocks.keys(j, layout)
            seen_RC = visible(queries, keys)
            k_sel_CD = None if k_sel is None else k_sel[j]
            logits_KGRC, selecting_RC = _logits(rule, q_KGRD, k[j], q_sel_RD, k_sel_CD, dtype)
            f_RC, f_next_C = _mask_tile(selecting_RC, f_JC[j], queries, keys, rule)
            logits_KGRC -= jnp.where(seen_RC, f_RC, HIDDEN)  # one subtrahend for all heads
            new_top_KGR = jnp.maximum(top_KGR, logits_KGRC.max(axis=-1))
            weights_KGRC = jnp.exp(logits_KGRC - new_top_KGR[..., None])
            fade_KGR = jnp.exp(top_KGR - new_top_KGR)
            v_KCD = v[j]
            values_KGRD = jnp.einsum(
                "kgrc,kcd->kgrd", weights_KGRC.astype(v_KCD.dtype), v_KCD, preferred_element_type=dtype
            )
            if rule.tau is not None:
                forgotten_R += jnp.sum(jnp.minimum(f_RC, rule.tau) / rule.tau, axis=-1, where=seen_RC)
            return (
                new_top_KGR,
                total_KGR * fade_KGR + weights_KGRC.sum(axis=-1),
                out_KGRD * fade_KGR[..., None] + values_KGRD,
                forgotten_R,
                f_JC.at[j].set(f_next_C),
            )

        out_zeros = zeros((*heads, blocks.v.shape[-1]))
        start = zeros(heads) + NOTHING_SEEN, zeros(heads), out_zeros, forgotten_R, carry.f
        top_KGR, total_KGR, out_KGRD, forgotten_R, f_next_JC = jax.lax.fori_loop(
            0, _blocks_until(queries, blocks, layout), key_block, start
        )
        out_KGRD = (out_KGRD / jnp.where(total_KGR == 0, 1, total_KGR)[..., None]).astype(blocks.q.dtype)
        # A row that sees nothing has a log-sum-exp above everything, so that the backward pass's weights are 0.
        lse_KGR = jnp.where(total_KGR == 0, HIDDEN, top_KGR + jnp.log(total_KGR))
        return carry._replace(f=f_next_JC), (out_KGRD, forgotten_R, lse_KGR, carry.f, layout)

    by_block = _positions(num_blocks, rows), blocks.q, blocks.q_sel, blocks.q_segment
    start = _Carry(blocks.f_start, blocks.keys_and_values(), blocks.layout())
    return jax.lax.scan(query_block, start, by_block)[1]


def _transpose_sequence(
    rule: Rule,
    offset: Array,
    blocks: _Blocks,
    out_IKGRD: Array,
    lse_IKGR: Array,
    f_IJC: Array,
    layouts: Layout | None,
    d_out_IKGRD: Array,
    d_forgotten_IR: Array,
) -> tuple[Array | None, ...]:
    """Backward pass of one sequence: gradients of the first six fields of `_Blocks`."""
    whole = blocks.keys_and_values()
    dtype = f_IJC.dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
    zeros = functools.partial(_zeros, like=blocks.f_start)
    is_first_KG11 = jnp.arange(math.prod(blocks.q.shape[1:3])).reshape(*blocks.q.shape[1:3], 1, 1) == 0
    delta_IKGR = jnp.sum(d_out_IKGRD.astype(dtype) * out_IKGRD.astype(dtype), axis=-1)

    def query_block(carry, block):
        position_R, q_KGRD, q_sel_RD, segment_R, lse_KGR, f_JC, delta_KGR, d_out_KGRD, d_forgotten_R, *layouts = block
        queries = Queries(offset + position_R, segment_R)
        (k, v, k_sel), sums = carry
        layout, earlier = layouts

        def key_block(n, made):
            d_q_KGRD, d_q_sel_RD, d_k_JKCD, d_v_JKCD, d_k_sel_JCD, d_f_JC = made
            j = n if layout is None else layout.block(n)
            keys, k_KCD, v_KCD = blocks.keys(j, layout), k[j], v[j]
            seen_RC = visible(queries, keys)
            k_sel_CD = None if k_sel is None else k_sel[j]
            logits_KGRC, selecting_RC = _logits(rule, q_KGRD, k_KCD, q_sel_RD, k_sel_CD, dtype)
            mask_tile = functools.partial(_mask_tile, queries=queries, keys=keys, rule=rule)
            (f_RC, _), transpose = jax.vjp(mask_tile, selecting_RC, f_JC[j])
            weights_KGRC = jnp.exp(logits_KGRC - jnp.where(seen_RC, f_RC, HIDDEN) - lse_KGR[..., None])
            d_weights_KGRC = dot("kgrd,kcd->kgrc", d_out_KGRD, v_KCD)
            d_logits_KGRC = weights_KGRC * (d_weights_KGRC - delta_KGR[..., None])
            d_f_RC = -d_logits_KGRC.sum(axis=(0, 1))
            if rule.tau is not None:
                d_f_RC += jnp.where(seen_RC & (f_RC < rule.tau), d_forgotten_R[:, None] / rule.tau, 0)
            d_selecting_RC, d_f_C = transpose((d_f_RC, d_f_JC[j]))
            if k_sel_CD is not None:
                d_q_sel_RD += dot("rc,cd->rd", d_selecting_RC, k_sel_CD)
                d_k_sel_JCD = d_k_sel_JCD.at[j].add(dot("rc,rd->cd", d_selecting_RC, q_sel_RD))
            elif rule.selection is not Selection.OFF:
                d_logits_KGRC += jnp.where(is_first_KG11, d_selecting_RC, 0)
            d_logits_KGRC = d_logits_KGRC.astype(k_KCD.dtype)
            return (
                d_q_KGRD + dot("kgrc,kcd->kgrd", d_logits_KGRC, k_KCD),
                d_q_sel_RD,
                d_k_JKCD.at[j].add(dot("kgrc,kgrd->kcd", d_logits_KGRC, q_KGRD)),
                d_v_JKCD.at[j].add(dot("kgrc,kgrd->kcd", weights_KGRC.astype(v_KCD.dtype), d_out_KGRD)),
                d_k_sel_JCD,
                d_f_JC.at[j].set(d_f_C),
            )

        start = zeros(q_KGRD.shape), None if q_sel_RD is None else zeros(q_sel_RD.shape), *sums
        count = _blocks_until(queries, blocks, layout)
        d_q_KGRD, d_q_sel_RD, *sums = jax.lax.fori_loop(0, count, key_block, start)
        carry = carry[0], tuple(sums)
        if layout is not None:
            carry = unfolded(carry[0], carry[1], whole, layout, earlier)
        return carry, ((rule.scale * d_q_KGRD).astype(q_KGRD.dtype), d_q_sel_RD)

    held, earlier = whole, None
    if layouts is not None:
        held = filled(whole, whole, jax.tree.map(lambda x: x[-1], layouts), jnp.int32(0))
        earlier = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more[:-1]]), blocks.layout(), layouts)
    nothing = tuple(None if x is None else zeros(x.shape) for x in (*whole, blocks.f_start))
    by_block = (
        _positions(blocks.q.shape[0], blocks.q.shape[3]),
        *(blocks.q, blocks.q_sel, blocks.q_segment),
        *(lse_IKGR, f_IJC, delta_IKGR, d_out_IKGRD, d_forgotten_IR),
        *(layouts, earlier),
    )
    made: Any = jax.lax.scan(query_block, (held, nothing), by_block, reverse=True)
    (_, (d_k, d_v, d_k_sel, d_f_start)), (d_q, d_q_sel) = made
    d_k, d_q_sel, d_k_sel = jax.tree.map(lambda x: rule.scale * x, (d_k, d_q_sel, d_k_sel))
    return d_q, d_k.astype(blocks.k.dtype), d_v.astype(blocks.v.dtype), d_q_sel, d_k_sel, d_f_start


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, offset: Array, blocks: _Blocks) -> tuple[Array, Array]:
    """(out [B, I, K, G, R, D], forgotten [B, I, R])."""
    return _attend_forward(rule, offset, blocks)[0]


def _attend_forward(rule: Rule, offset: Array, blocks: _Blocks):
    made = _each_sequence(functools.partial(_attend_sequence, rule, offset), blocks)
    out, forgotten, lse, carries, layouts = jax.tree.map(keep, made)
    return (out, forgotten), (offset, blocks, out, lse, carries, layouts)


def _attend_backward(rule: Rule, residuals, cotangents):
    offset, *residuals = residuals
    gradients = _each_sequence(functools.partial(_transpose_sequence, rule, offset), *residuals, *cotangents)
    return None, _Blocks._make((*gradients, None, None, None, None, None))  # integers and bounds have no gradient


_attend.defvjp(_attend_forward, _attend_backward)


def _each_sequence(function: Callable, *arrays):
    """`function` of every sequence of the batch: one after another on a CPU, so that tiles stay in its cache."""
    if _one_by_one():
        return jax.lax.map(lambda one: function(*one), arrays)
    return jax.vmap(function)(*arrays)


def _one_by_one() -> bool:
    """Whether every sequence has loops of its own, whose length may depend on it."""
    return jax.default_backend() == "cpu"


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros in the dtype of `like`, and varying over the same mesh axes, as the carry of a loop must."""
    return jax.lax.pcast(jnp.zeros(shape, like.dtype), tuple(_varying(like)), to="varying")


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _vary_alike(arrays):
    """All of them varying over every mesh axis that one varies over: inside a `shard_map` loops mix them."""
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - _varying(x)), to="varying"), arrays)


def _positions(num_blocks: int, rows: int) -> Array:
    return jnp.arange(num_blocks * rows, dtype=jnp.int32).reshape(num_blocks, rows)


def _split(x: Array) -> Array:
    """[B, N, ...] to equal blocks [B, I, R, ...], filled up with zeros (a zero q_sel selects nothing)."""
    length = x.shape[1]
    num_blocks = math.ceil(length / BLOCK)
    rows = math.ceil(length / num_blocks / GROUP) * GROUP
    padded = jnp.pad(x, [(0, 0), (0, num_blocks * rows - length)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(x.shape[0], num_blocks, rows, *x.shape[2:])


def _join(x: Array, length: int) -> Array:
    """The inverse: [B, I, R, ...] to [B, length, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
