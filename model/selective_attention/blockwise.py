"""Selective attention in blocks of queries and keys, with `jax.custom_vjp`: nothing of size N x M ever exists.

Forward: for query blocks in order and, inside, for the key blocks up to the diagonal, `_mask_tile` makes a tile of F
from its carry (a vector f [B, M], F at the block's first query) and advances the carry; softmax is accumulated online.
Backward, in reverse order: the tile of F is made again from the saved carry, and the transpose of `_mask_tile` takes
the gradients of F and of the later carry to the selecting head's q and k and to the earlier carry.
Between the two live the inputs, the outputs, their log-sum-exp, and the carries [N / R, B, M].

Shape letters: B batch, N queries, M keys, K key/value heads, G query heads of each, D head width; R rows (queries) and
C columns (keys) of a tile, I query blocks of R, J key blocks of C.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .selection import Keys, Queries, Selection, select, visible

BLOCK = 128  # rows and columns of a tile
HIDDEN = -1e30  # instead of F where a query does not look; finite, so that rows that see nothing stay free of NaN
NOTHING_SEEN = -1e29  # a running maximum that real logits exceed, and against which exp(HIDDEN - .) is exactly 0


class _Rule(NamedTuple):
    """What is fixed when the program is traced."""

    scale: float
    selection: Selection
    tau: float | None


class _Rows(NamedTuple):
    """Arrays along the queries, one block or all of them (then with a leading axis I)."""

    q: Array  # [B, K, G, R, D]
    q_sel: Array  # [B, R, D], float32
    queries: Queries


class _Columns(NamedTuple):
    """Arrays along the keys, one block or all of them (then with a leading axis J)."""

    k: Array  # [B, K, C, D]
    v: Array  # [B, K, C, D]
    k_sel: Array  # [B, C, D], float32
    keys: Keys


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array,
    k_sel: Array,
    f_start: Array,
    *,
    offset: Array | int,
    evict_at: Array | None,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    scale: float,
    selection: Selection,
    tau: float | None,
) -> tuple[Array, Array | None]:
    """Selective attention of a block of queries; arguments and results as `reference.attend`."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    rows = _Rows(
        jnp.einsum("ibrkgd->ibkgrd", _split(q.reshape(batch, length, num_kv_heads, -1, head_dim))),
        _split(q_sel.astype(dtype)),
        _split_queries(offset, length, q_segment_ids),
    )
    columns = _Columns(
        jnp.einsum("jbckd->jbkcd", _split(k)),
        jnp.einsum("jbckd->jbkcd", _split(v)),
        _split(k_sel.astype(dtype)),
        _split_keys(k.shape[1], kv_segment_ids, evict_at),
    )
    out_IBKGRD, forgotten_IBR = _attend(_Rule(scale, selection, tau), rows, columns, _split(f_start.astype(dtype)))
    out = _join(jnp.einsum("ibkgrd->ibrkgd", out_IBKGRD), length).reshape(batch, length, num_heads, v.shape[-1])
    return out, None if tau is None else _join(forgotten_IBR, length)


def column_sums(
    q_sel: Array,
    k_sel: Array,
    *,
    offset: Array | int,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    scale: float,
    selection: Selection,
) -> Array:
    """What a block of queries adds to F for all later queries; arguments and results as `reference.column_sums`."""
    dtype = jnp.promote_types(q_sel.dtype, jnp.float32)
    queries = _split_queries(offset, q_sel.shape[1], q_segment_ids)
    keys = _split_keys(k_sel.shape[1], kv_segment_ids, None)
    rule = _Rule(scale, selection, None)
    sums_JBC = _column_sums(rule, _split(q_sel.astype(dtype)), _split(k_sel.astype(dtype)), queries, keys)
    return _join(sums_JBC, k_sel.shape[1])


def _mask_tile(
    q_sel_BRD: Array, k_sel_BCD: Array, f_BC: Array, queries: Queries, keys: Keys, rule: _Rule
) -> tuple[Array, Array]:
    """A tile of F [B, R, C] from the carry f at its first row, and f at the row after its last."""
    if rule.selection is Selection.OFF:
        return jnp.zeros((f_BC.shape[0], q_sel_BRD.shape[1], f_BC.shape[1]), f_BC.dtype), f_BC
    s_BRC = select(q_sel_BRD, k_sel_BCD, queries, keys, rule.scale, rule.selection)
    # Exclusive sum over the rows as a matmul, which is the fastest form of it, in full precision.
    before_RR = jnp.tri(s_BRC.shape[1], k=-1, dtype=s_BRC.dtype)
    within_BRC = jnp.einsum("rt,btc->brc", before_RR, s_BRC, precision=jax.lax.Precision.HIGHEST)
    return f_BC[:, None, :] + within_BRC, f_BC + s_BRC.sum(axis=1)


def _logits(rule: _Rule, q_BKGRD: Array, k_BKCD: Array, f_BRC: Array, seen_BRC: Array) -> Array:
    """Logits minus F [B, K, G, R, C]. One subtrahend for all heads holds F and everything that hides keys."""
    subtrahend_BRC = jnp.where(seen_BRC, f_BRC, -HIDDEN)
    logits_BKGRC = jnp.einsum("bkgrd,bkcd->bkgrc", q_BKGRD, k_BKCD, preferred_element_type=f_BRC.dtype)
    return rule.scale * logits_BKGRC - subtrahend_BRC[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: _Rule, rows: _Rows, columns: _Columns, f_JBC: Array) -> tuple[Array, Array]:
    """(out [I, B, K, G, R, D], forgotten [I, B, R])."""
    return _attend_forward(rule, rows, columns, f_JBC)[0]


def _attend_forward(rule: _Rule, rows: _Rows, columns: _Columns, f_JBC: Array):
    dtype = f_JBC.dtype

    def query_block(f_JBC, row: _Rows):
        heads = row.q.shape[:-1]

        def key_block(j, carry):
            top_BKGR, total_BKGR, out_BKGRD, forgotten_BR, f_JBC = carry
            column = _block(columns, j)
            seen_BRC = visible(row.queries, column.keys)
            f_BRC, f_next_BC = _mask_tile(row.q_sel, column.k_sel, f_JBC[j], row.queries, column.keys, rule)
            logits_BKGRC = _logits(rule, row.q, column.k, f_BRC, seen_BRC)
            new_top_BKGR = jnp.maximum(top_BKGR, logits_BKGRC.max(axis=-1))
            weights_BKGRC = jnp.exp(logits_BKGRC - new_top_BKGR[..., None])
            fade_BKGR = jnp.exp(top_BKGR - new_top_BKGR)
            values_BKGRD = jnp.einsum(
                "bkgrc,bkcd->bkgrd",
                weights_BKGRC.astype(column.v.dtype),
                column.v,
                preferred_element_type=dtype,
            )
            if rule.tau is not None:
                forgotten_BR += jnp.sum(jnp.minimum(f_BRC, rule.tau) / rule.tau, axis=-1, where=seen_BRC)
            return (
                new_top_BKGR,
                total_BKGR * fade_BKGR + weights_BKGRC.sum(axis=-1),
                out_BKGRD * fade_BKGR[..., None] + values_BKGRD,
                forgotten_BR,
                f_JBC.at[j].set(f_next_BC),
            )

        start = (
            jnp.full(heads, NOTHING_SEEN, dtype),
            jnp.zeros(heads, dtype),
            jnp.zeros((*heads, columns.v.shape[-1]), dtype),
            jnp.zeros(row.q_sel.shape[:2], dtype),
            f_JBC,
        )
        blocks = _blocks_until(row.queries, columns.keys)
        top, total, out, forgotten, f_next_JBC = jax.lax.fori_loop(0, blocks, key_block, start)
        out = out / jnp.where(total == 0, 1, total)[..., None]
        lse = jnp.where(
            total == 0, -HIDDEN, top + jnp.log(total)
        )  # so that exp(logits - lse) is 0 in the backward pass
        return f_next_JBC, (out.astype(row.q.dtype), lse, forgotten, f_JBC)

    _, (out, lse, forgotten, f_IJBC) = jax.lax.scan(query_block, f_JBC, rows)
    return (out, forgotten), (rows, columns, f_IJBC, out, lse)


def _attend_backward(rule: _Rule, residuals, cotangents):
    rows, columns, f_IJBC, out_IBKGRD, lse_IBKGR = residuals
    d_out_IBKGRD, d_forgotten_IBR = cotangents
    dtype = f_IJBC.dtype
    delta_IBKGR = jnp.sum(d_out_IBKGRD.astype(dtype) * out_IBKGRD.astype(dtype), axis=-1)

    def query_block(carry, block):
        row, f_JBC, lse_BKGR, delta_BKGR, d_out_BKGRD, d_forgotten_BR = block

        def key_block(j, carry):
            d_q_BKGRD, d_q_sel_BRD, d_k, d_v, d_k_sel, d_f_JBC = carry
            column = _block(columns, j)
            seen_BRC = visible(row.queries, column.keys)
            mask_tile = functools.partial(_mask_tile, queries=row.queries, keys=column.keys, rule=rule)
            (f_BRC, _), transpose = jax.vjp(mask_tile, row.q_sel, column.k_sel, f_JBC[j])
            logits_BKGRC = _logits(rule, row.q, column.k, f_BRC, seen_BRC)
            weights_BKGRC = jnp.exp(logits_BKGRC - lse_BKGR[..., None])
            d_weights_BKGRC = jnp.einsum("bkgrd,bkcd->bkgrc", d_out_BKGRD, column.v, preferred_element_type=dtype)
            d_logits_BKGRC = weights_BKGRC * (d_weights_BKGRC - delta_BKGR[..., None])
            d_f_BRC = -d_logits_BKGRC.sum(axis=(1, 2))
            if rule.tau is not None:
                d_f_BRC += jnp.where(seen_BRC & (f_BRC < rule.tau), d_forgotten_BR[..., None] / rule.tau, 0)
            d_q_sel, d_k_sel_BCD, d_f_BC = transpose((d_f_BRC, d_f_JBC[j]))

            narrow_BKGRC = d_logits_BKGRC.astype(row.q.dtype)
            dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
            return (
                d_q_BKGRD + dot("bkgrc,bkcd->bkgrd", narrow_BKGRC, column.k),
                d_q_sel_BRD + d_q_sel,
                d_k.at[j].add(dot("bkgrc,bkgrd->bkcd", narrow_BKGRC, row.q)),
                d_v.at[j].add(dot("bkgrc,bkgrd->bkcd", weights_BKGRC.astype(d_out_BKGRD.dtype), d_out_BKGRD)),
                d_k_sel.at[j].add(d_k_sel_BCD),
                d_f_JBC.at[j].set(d_f_BC),
            )

        start = (jnp.zeros(row.q.shape, dtype), jnp.zeros(row.q_sel.shape, dtype), *carry)
        blocks = _blocks_until(row.queries, columns.keys)
        d_q, d_q_sel, *carry = jax.lax.fori_loop(0, blocks, key_block, start)
        return tuple(carry), ((d_q * rule.scale).astype(row.q.dtype), d_q_sel)

    zeros = tuple(jnp.zeros(x.shape, dtype) for x in (columns.k, columns.v, columns.k_sel, f_IJBC[0]))
    blocks = (rows, f_IJBC, lse_IBKGR, delta_IBKGR, d_out_IBKGRD, d_forgotten_IBR)
    (d_k, d_v, d_k_sel, d_f_JBC), (d_q, d_q_sel) = jax.lax.scan(query_block, zeros, blocks, reverse=True)
    d_k, d_v = (d_k * rule.scale).astype(columns.k.dtype), d_v.astype(columns.v.dtype)
    return _Rows(d_q, d_q_sel, None), _Columns(d_k, d_v, d_k_sel, None), d_f_JBC


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _column_sums(rule: _Rule, q_sel_IBRD: Array, k_sel_JBCD: Array, queries: Queries, keys: Keys) -> Array:
    """Sums of S over the queries [J, B, C]."""
    return _column_sums_forward(rule, q_sel_IBRD, k_sel_JBCD, queries, keys)[0]


def _column_sums_forward(rule: _Rule, q_sel_IBRD: Array, k_sel_JBCD: Array, queries: Queries, keys: Keys):
    def query_block(sums_JBC, row):
        q_sel_BRD, row_queries = row

        def key_block(j, sums_JBC):
            s_BRC = select(q_sel_BRD, k_sel_JBCD[j], row_queries, _block(keys, j), rule.scale, rule.selection)
            return sums_JBC.at[j].add(s_BRC.sum(axis=1))

        return jax.lax.fori_loop(0, _blocks_until(row_queries, keys), key_block, sums_JBC), None

    zeros = jnp.zeros(k_sel_JBCD.shape[:-1], k_sel_JBCD.dtype)
    sums_JBC, _ = jax.lax.scan(query_block, zeros, (q_sel_IBRD, queries))
    return sums_JBC, (q_sel_IBRD, k_sel_JBCD, queries, keys)


def _column_sums_backward(rule: _Rule, residuals, d_sums_JBC: Array):
    q_sel_IBRD, k_sel_JBCD, queries, keys = residuals

    def query_block(d_k_sel_JBCD, row):
        q_sel_BRD, row_queries = row

        def key_block(j, carry):
            d_q_sel_BRD, d_k_sel_JBCD = carry

            def tile(q_sel_BRD, k_sel_BCD):
                s_BRC = select(q_sel_BRD, k_sel_BCD, row_queries, _block(keys, j), rule.scale, rule.selection)
                return s_BRC.sum(axis=1)

            _, transpose = jax.vjp(tile, q_sel_BRD, k_sel_JBCD[j])
            d_q_sel, d_k_sel_BCD = transpose(d_sums_JBC[j])
            return d_q_sel_BRD + d_q_sel, d_k_sel_JBCD.at[j].add(d_k_sel_BCD)

        start = jnp.zeros_like(q_sel_BRD), d_k_sel_JBCD
        d_q_sel, d_k_sel = jax.lax.fori_loop(0, _blocks_until(row_queries, keys), key_block, start)
        return d_k_sel, d_q_sel

    d_k_sel, d_q_sel = jax.lax.scan(query_block, jnp.zeros_like(k_sel_JBCD), (q_sel_IBRD, queries))
    return d_q_sel, d_k_sel, None, None


_column_sums.defvjp(_column_sums_forward, _column_sums_backward)


def _blocks_until(queries: Queries, keys: Keys) -> Array:
    """How many key blocks [J, C] lie, in part, not above the diagonal of a block of queries."""
    num_blocks, columns = keys.position.shape
    return jnp.minimum(num_blocks, queries.position[-1] // columns + 1)


def _block_size(length: int) -> int:
    """The size of equal blocks, at most BLOCK, with little padding."""
    return math.ceil(length / math.ceil(length / BLOCK))


def _split(x: Array) -> Array:
    """[B, N, ...] to blocks [I, B, R, ...], zeros filled in: a zero q_sel selects nothing, late keys are hidden."""
    rows = _block_size(x.shape[1])
    padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % rows)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
    """The inverse: [I, B, R, ...] to [B, length, ...]."""
    joined = jnp.moveaxis(x, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _split_queries(offset: Array | int, length: int, segment_ids: Array | None) -> Queries:
    rows = _block_size(length)
    position_N = Queries.at(offset, length + -length % rows, None).position
    return Queries(position_N.reshape(-1, rows), None if segment_ids is None else _split(segment_ids))


def _split_keys(length: int, segment_ids: Array | None, evict_at: Array | None) -> Keys:
    columns = _block_size(length)
    keys = Keys.of(length, segment_ids, evict_at)
    position_M = jnp.arange(length + -length % columns, dtype=jnp.int32)
    first, segment, evict_at = (None if x is None else _split(x) for x in (keys.first, keys.segment, keys.evict_at))
    return Keys(position_M.reshape(-1, columns), first, segment, evict_at)


def _block(arrays, j: Array):
    """Block j of arrays with a leading axis of blocks."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), arrays)
