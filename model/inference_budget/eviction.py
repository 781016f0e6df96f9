"""Choosing who leaves: one token at a time, and for a whole block of tokens in one pass over its queries.

Within a layer, hiding a token does not change what any query selects: S depends on queries and keys, which are
functions of the layer's input. So all evictions of a layer can be found first, by a scan over its queries that touches
one vector per sequence, and attention then runs once, masked by the query at which each token left. Policies that judge
by attention weights need the held tokens' softmax at each step of that scan as well.

The columns of a block are the layer's slots, in any order but with <BOS> first, and then the block's own tokens.

Shape letters: B rows, T new tokens (queries), R of them at a time, M columns, H query heads, K key/value heads, D head
width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from selective_attention import Selection
from selective_attention.implementations.reference import BIG_NEGATIVE
from selective_attention.selection import Keys, Queries, select

from .policies import EvictionPolicy, Held

NEVER = jnp.iinfo(jnp.int32).max
ROWS = 32  # queries whose logits are in memory at a time


class Columns(NamedTuple):
    """Keys of a block and what is known of their tokens."""

    k: Array  # [B, M, K, D]
    v: Array  # [B, M, K, D]
    k_sel: Array  # [B, M, D], the selecting head's
    position: Array  # int32 [B, M], negative where there is no token
    f: Array | None  # float32 [B, M], F of the next query; None in a model without selection
    score: Array | None  # float32 [B, M], the policy's


def victim(priority_BM: Array, position_BM: Array) -> Array:
    """The slot, int32 [B], with the largest priority; among equal ones that of the oldest token."""
    best_BM = priority_BM == jnp.max(priority_BM, axis=-1, keepdims=True)
    return jnp.argmin(jnp.where(best_BM, position_BM, NEVER), axis=-1).astype(jnp.int32)


def protected(priority_BM: Array, position_BM: Array) -> Array:
    """The priorities with <BOS> never leaving and free slots first of all."""
    priority_BM = jnp.where(position_BM == 0, -jnp.inf, priority_BM)
    return jnp.where(position_BM < 0, jnp.inf, priority_BM)


@jax.named_scope("evict")
def evict(
    policy: EvictionPolicy,
    columns: Columns,
    q: Array,
    q_sel: Array,
    *,
    start_B: Array,
    count_B: Array,
    budget_B: Array,
    layer: Array | int,
    selection: Selection,
    heads_axis: str | None,
) -> tuple[Array, Columns]:
    """The column index of the query from which on each column is hidden, int32 [B, M], and the columns afterwards.

    Args:
      policy: who leaves.
      columns: the slots and the T new tokens, whose f and score are 0.
      q, q_sel: [B, T, H, D] and [B, T, D] of the new tokens.
      start_B: int32 [B], position of each row's first new token.
      count_B: int32 [B], new tokens of each row; what follows them is padding.
      budget_B: int32 [B], tokens that the layer may hold.
      layer: its number.
      selection: the model's rule of F.
      heads_axis: the axis of a surrounding `shard_map` that heads are sharded over, if any.
    """
    batch, length, num_heads, head_dim = q.shape
    scale, num_columns = head_dim**-0.5, columns.position.shape[1]
    old = num_columns - length
    column_M = jnp.arange(num_columns, dtype=jnp.int32)
    keys = Keys(column_M, columns.position == 0, None, None)
    budget_B1 = budget_B[:, None]

    def block(carry, queries):
        t_R, q_BRHD, q_sel_BRD = queries
        s_BRM = logits_BHRM = None
        if selection is not Selection.OFF:
            s_BRM = select(q_sel_BRD, columns.k_sel, Queries(old + t_R, None), keys, scale, selection)
        if policy.keeps_score:
            q_BRKGD = q_BRHD.reshape(batch, t_R.shape[0], columns.k.shape[2], -1, head_dim)
            dtype = jnp.promote_types(q.dtype, jnp.float32)
            logits = scale * jnp.einsum("brkgd,bmkd->bkgrm", q_BRKGD, columns.k, preferred_element_type=dtype)
            logits_BHRM = logits.reshape(batch, num_heads, t_R.shape[0], num_columns)
        by_row = t_R, _rows_first(s_BRM, 1), _rows_first(logits_BHRM, 2)
        return jax.lax.scan(row, carry, by_row)[0], None

    def row(carry, query):
        evict_at_BM, f_BM, score_BM = carry
        t, s_BM, logits_BHM = query
        column, now_B1 = old + t, start_B[:, None] + t
        real_B1 = t < count_B[:, None]
        here_BM = (evict_at_BM == NEVER) & (columns.position >= 0) & (column_M < column)
        held = Held(columns.position, f_BM, score_BM, now_B1, budget_B1, layer)
        priority_BM = jnp.where(here_BM & (columns.position > 0), policy.priority(held), -jnp.inf)
        leaves_BM = column_M == victim(priority_BM, columns.position)[:, None]
        leaves_BM &= real_B1 & (now_B1 >= budget_B1)  # before position i, i tokens have come
        evict_at_BM = jnp.where(leaves_BM, column, evict_at_BM)
        if score_BM is not None:
            seen_BM = (here_BM & ~leaves_BM) | (column_M == column)
            f_B1M = 0 if f_BM is None else f_BM[:, None]
            weights_BHM = jax.nn.softmax(jnp.where(seen_BM[:, None], logits_BHM - f_B1M, BIG_NEGATIVE), axis=-1)
            weights_BM = over_heads(jnp.mean(weights_BHM, axis=1), heads_axis)
            score_BM = jnp.where(real_B1, policy.observe(score_BM, weights_BM), score_BM)
        if f_BM is not None:
            f_BM = f_BM + jnp.where(real_B1, s_BM, 0)
        return (evict_at_BM, f_BM, score_BM), None

    start = jnp.full((batch, num_columns), NEVER), columns.f, columns.score
    queries = jnp.arange(length, dtype=jnp.int32), jnp.moveaxis(q, 1, 0), jnp.moveaxis(q_sel, 1, 0)
    whole, rest = length - length % ROWS, length % ROWS

    def rows_first(q_RB: Array) -> Array:  # queries go by rows first, because that is what a scan cuts
        return q_RB if q_RB.ndim == 1 else jnp.moveaxis(q_RB, 0, 1)

    carry = start
    if whole:
        blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, ROWS, *x.shape[1:]), queries)
        carry, _ = jax.lax.scan(lambda c, x: block(c, jax.tree.map(rows_first, x)), carry, blocks)
    if rest:
        carry, _ = block(carry, jax.tree.map(lambda x: rows_first(x[whole:]), queries))
    evict_at_BM, f_BM, score_BM = carry
    real_BM = (column_M < old) | (column_M - old < count_B[:, None])
    position_BM = jnp.where(real_BM & (evict_at_BM == NEVER), columns.position, -1)
    hidden_at_BM = jnp.where(columns.position < 0, 0, evict_at_BM)  # a free slot is never seen
    return hidden_at_BM, columns._replace(position=position_BM, f=f_BM, score=score_BM)


def over_heads(mean_BM: Array, heads_axis: str | None) -> Array:
    """A mean over one shard's heads -> the mean over all heads."""
    return mean_BM if heads_axis is None else jax.lax.pmean(mean_BM, heads_axis)


def of_head_zero(x: Array, heads_axis: str | None) -> Array:
    """What the shard that holds head 0 has computed, on all shards."""
    if heads_axis is None:
        return x
    return jax.lax.psum(jnp.where(jax.lax.axis_index(heads_axis) == 0, x, 0), heads_axis)


def _rows_first(x: Array | None, axis: int) -> Array | None:
    return None if x is None else jnp.moveaxis(x, axis, 0)
