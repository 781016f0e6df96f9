"""Choosing who leaves: one token at a time, and for a whole block of tokens in one pass over its queries.

Within a layer, hiding a token does not change what any query selects: S depends on queries and keys, which are
functions of the layer's input. So all evictions of a layer can be found first, by a scan over its queries that touches
one vector per row, and attention then runs once, masked by the query at which each token left. Policies that judge by
attention weights need the held tokens' softmax at each step of that scan as well. On TPUs the scan is one kernel:
`weights_kernel` for those, `eviction_kernel` for the others.

The columns of a block are the layer's slots, in any order, and then the block's own tokens; <BOS> is the first of all.
Shape letters: README.md.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from selective_attention import Selection, TransformerConfig
from selective_attention.attention import implementation_module
from selective_attention.implementations import implementation_name
from selective_attention.parallel import from_first_shard
from selective_attention.selection import HIDDEN, Keys, Projections, Queries, Rule, Seen, select

from . import eviction_kernel, weights_kernel
from .eviction_kernel import NEVER
from .policies import FIXED, H2O, TOVA, EvictionPolicy, Held, Selective

QUERIES = 32  # whose logits are in memory at a time


class Arriving(NamedTuple):
    """Which tokens arrive, and how many the layer may hold."""

    start: Array  # int32 [B], the position of each row's first new token
    num_tokens: Array  # int32 [B], new tokens of each row; what follows them is padding
    budget: Array  # int32 [B], tokens that the layer may hold; may be traced
    layer: Array | int  # its number


class Columns(NamedTuple):
    """Keys and values, and what is known of their tokens."""

    k: Array  # [B, M, K, D]
    v: Array  # [B, M, K, D]
    k_sel: Array | None  # [B, M, D], only where the selecting head has its own projections
    position: Array  # int32 [B, M], negative where there is no token
    f: Array | None  # float32 [B, M], F of the next query; None in a model without selection
    score: Array | None  # float32 [B, M], the policy's, if it keeps one


def victim(priority_BM: Array, position_BM: Array) -> Array:
    """The slot, int32 [B], with the largest priority; among equal ones that of the oldest token."""
    best_BM = priority_BM == jnp.max(priority_BM, axis=-1, keepdims=True)
    return jnp.argmin(jnp.where(best_BM, position_BM, NEVER), axis=-1).astype(jnp.int32)


def protected(priority_BM: Array, position_BM: Array) -> Array:
    """The priorities with <BOS> never leaving and free slots first of all."""
    priority_BM = jnp.where(position_BM == 0, -jnp.inf, priority_BM)
    return jnp.where(position_BM < 0, jnp.inf, priority_BM)


def attend_evicting(
    policy: EvictionPolicy,
    config: TransformerConfig,
    held: Columns | None,
    new: Projections,
    arriving: Arriving,
    heads_axis: str | None = None,
) -> tuple[Array, Columns, Array]:
    """Attention of T new tokens over what a layer holds and over themselves, with the policy's evictions on the way.

    A policy that evicts per head has a row for each key/value head: R rows a sequence instead of 1.

    Args:
      policy: decides who leaves.
      config: the model's.
      held: the layer's slots, with B * R rows; None for none.
      new: the projections of the new tokens, with B rows.
      arriving: the new tokens, with B rows.
      heads_axis: the axis of a surrounding `shard_map` that heads are sharded over, if any.

    Returns:
      out [B, T, H, D]; the columns after the last token, with B * R rows; and from which query on each column is
      hidden, int32 [B * R, M], counted in columns: positions where nothing was held.
    """
    groups = new.k.shape[2] if policy.per_head else 1
    start, num_tokens, budget = (jnp.repeat(x, groups) for x in arriving[:3])
    arriving = Arriving(start, num_tokens, budget, arriving.layer)
    q, k, v = (heads_as_rows(x, groups) for x in (new.q, new.k, new.v))
    columns = _joined(held, _columns(policy, config, Projections(q, k, v, new.q_sel, new.k_sel), arriving))
    q_sel, k_sel = new.q_sel, columns.k_sel
    if q_sel is None or k_sel is None:
        # From heads side by side: a slice of the axis of heads makes the TPU compiler lay out all of them anew for it.
        firsts = (x.reshape(*x.shape[:2], -1)[..., : config.head_dim] for x in (q, columns.k))
        q_sel, k_sel = (from_first_shard(first, heads_axis) for first in firsts)
    hidden_at, after = evict(policy, config, columns, q, q_sel, k_sel, arriving, heads_axis)
    f = jnp.zeros(columns.position.shape, jnp.promote_types(q.dtype, jnp.float32)) if columns.f is None else columns.f
    seen = Seen(offset=columns.position.shape[1] - q.shape[1], evict_at=hidden_at)
    rule, whole = Rule(config.head_dim**-0.5, config.selection), Projections(q, columns.k, columns.v, q_sel, k_sel)
    out, _ = implementation_module(config.attention).attend(whole, f, seen, rule)
    return _rows_as_heads(out, new.q.shape), after, hidden_at


def _columns(policy: EvictionPolicy, config: TransformerConfig, new: Projections, arriving: Arriving) -> Columns:
    """The columns of new tokens, of which no query has made anything yet."""
    t_T = jnp.arange(new.q.shape[1], dtype=jnp.int32)
    position_BT = jnp.where(t_T < arriving.num_tokens[:, None], arriving.start[:, None] + t_T, -1)
    zeros_BT = jnp.zeros(position_BT.shape, jnp.promote_types(new.q.dtype, jnp.float32))
    return Columns(
        new.k,
        new.v,
        new.k_sel,
        position_BT,
        f=None if config.selection is Selection.OFF else zeros_BT,
        score=zeros_BT if policy.keeps_score else None,
    )


def _joined(held: Columns | None, new: Columns) -> Columns:
    """Both, in the dtypes of the new ones' keys and values."""
    if held is None:
        return new

    def join(old: Array, new: Array) -> Array:
        return jnp.concatenate([old.astype(new.dtype), new], axis=1)

    return jax.tree.map(join, held, new)


@jax.named_scope("evict")
def evict(
    policy: EvictionPolicy,
    config: TransformerConfig,
    columns: Columns,
    q: Array,
    q_sel: Array,
    k_sel: Array,
    arriving: Arriving,
    heads_axis: str | None,
) -> tuple[Array, Columns]:
    """The column index of the query from which on each column is hidden, int32 [B, M], and the columns afterwards.

    Args:
      policy: decides who leaves.
      config: the model's.
      columns: the slots and the T new tokens, whose f and score are 0.
      q: [B, T, H, D] of the new tokens.
      q_sel, k_sel: [B, T, D] and [B, M, D] of the selecting head.
      arriving: the new tokens.
      heads_axis: the axis of a surrounding `shard_map` that heads are sharded over, if any.
    """
    length, num_columns = q.shape[1], columns.position.shape[1]
    num_held = num_columns - length
    if has_kernel(policy, config, num_columns):
        evict_at_BM, f_BM = _by_kernel(policy, config, columns, q_sel, k_sel, arriving)
        score_BM = columns.score
    else:
        scan = _Scan(policy, config.selection, columns, k_sel, arriving, heads_axis, num_held)
        if heads_axis is None and has_weights_kernel(policy, config, q, columns.k):
            rule = Rule(config.head_dim**-0.5, config.selection)
            evict_at_BM, f_BM, score_BM = jax.lax.cond(
                weights_kernel.bounded(q, columns.k, columns.position, rule),
                lambda: _by_weights_kernel(policy, rule, columns, q, q_sel, k_sel, arriving),
                lambda: scan.all(q, q_sel),
            )
        else:
            evict_at_BM, f_BM, score_BM = scan.all(q, q_sel)
    column_M = jnp.arange(num_columns, dtype=jnp.int32)
    real_BM = (column_M < num_held) | (column_M - num_held < arriving.num_tokens[:, None])
    position_BM = jnp.where(real_BM & (evict_at_BM == NEVER), columns.position, -1)
    hidden_at_BM = jnp.where(columns.position < 0, 0, evict_at_BM)  # a free slot is never seen
    return hidden_at_BM, columns._replace(position=position_BM, f=f_BM, score=score_BM)


def has_kernel(policy: EvictionPolicy, config: TransformerConfig, num_columns: int) -> bool:
    """Whether the TPU kernel finds the eviction times, where it runs; everything else takes the scan."""
    by_f = type(policy) is Selective and config.selection is not Selection.UNPROTECTED_BOS  # <BOS> has no F there
    on_tpu = implementation_name(config.attention) == "pallas"
    return on_tpu and (by_f or type(policy) in FIXED) and num_columns <= eviction_kernel.MOST_COLUMNS


def _by_kernel(
    policy: EvictionPolicy, config: TransformerConfig, columns: Columns, q_sel: Array, k_sel: Array, arriving: Arriving
) -> tuple[Array, Array | None]:
    """When each column left, int32 [B, M], and F of the next query, as the scan finds them."""
    start_B, length = arriving.start, q_sel.shape[1]
    rule = Rule(config.head_dim**-0.5, config.selection)
    held = Held(columns.position, columns.f, None, start_B[:, None], arriving.budget[:, None], arriving.layer)
    priority_BM = jnp.where(columns.position > 0, policy.priority(held), -jnp.inf)
    evicting = arriving.budget - start_B, arriving.num_tokens
    if type(policy) is Selective:
        return eviction_kernel.times(rule, priority_BM, columns.position, (q_sel, k_sel), *evicting, length)
    evict_at_BM, _ = eviction_kernel.times(rule, priority_BM, columns.position, None, *evicting, length)
    if columns.f is None:
        return evict_at_BM, None
    real_BT = jnp.arange(length) < arriving.num_tokens[:, None]
    seen = Seen(offset=columns.position.shape[1] - length)
    sums_BM = implementation_module(config.attention).column_sums(
        jnp.where(real_BT[..., None], q_sel, 0), k_sel, seen, rule
    )
    return evict_at_BM, columns.f + sums_BM


def has_weights_kernel(policy: EvictionPolicy, config: TransformerConfig, q: Array, k: Array) -> bool:
    """Whether the TPU kernel finds the eviction times of a policy that weighs, where it runs and logits are bounded."""
    on_tpu = implementation_name(config.attention) == "pallas"
    known = type(policy) in (H2O, TOVA) and config.selection is not Selection.LEAKY  # whose F may be negative
    return on_tpu and known and weights_kernel.fits(q, k)


def _by_weights_kernel(
    policy: EvictionPolicy,
    rule: Rule,
    columns: Columns,
    q: Array,
    q_sel: Array,
    k_sel: Array,
    arriving: Arriving,
) -> tuple[Array, Array | None, Array | None]:
    """As `_Scan.all`."""
    assert columns.score is not None  # the policy keeps one
    weighed = weights_kernel.Weighed(policy, rule, columns.position, columns.f, columns.score)
    own = None if columns.k_sel is None else (q_sel, k_sel)
    evict_at_BM, f_BM, score_BM = weights_kernel.times(weighed, q, columns.k, own, arriving[:3])
    return evict_at_BM, None if columns.f is None else f_BM, score_BM


# When each column left, int32 [B, M]; F of the next query; the policy's scores.
_Carry = tuple[Array, Array | None, Array | None]


@dataclasses.dataclass(frozen=True)
class _Scan:
    """The steps of `evict`, whose arguments these are."""

    policy: EvictionPolicy
    selection: Selection
    columns: Columns
    k_sel: Array
    arriving: Arriving
    heads_axis: str | None
    num_held: int  # columns before those of the new tokens

    def all(self, q: Array, q_sel: Array) -> _Carry:
        """Takes in all queries, [B, T, ...]."""
        length, position = q.shape[1], self.columns.position
        carry = jnp.full(position.shape, NEVER), self.columns.f, self.columns.score
        queries = jnp.arange(length, dtype=jnp.int32), jnp.moveaxis(q, 1, 0), jnp.moveaxis(q_sel, 1, 0)
        whole, rest = length - length % QUERIES, length % QUERIES
        if whole:
            blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, QUERIES, *x.shape[1:]), queries)
            carry, _ = jax.lax.scan(lambda carry, some: (self.block(carry, some), None), carry, blocks)
        if rest:
            carry = self.block(carry, jax.tree.map(lambda x: x[whole:], queries))
        return carry

    def block(self, carry: _Carry, queries: tuple[Array, Array, Array]) -> _Carry:
        """Takes in Q queries: their numbers [Q], q [Q, B, H, D] and q_sel [Q, B, D]."""
        columns, (t_Q, q_QBHD, q_sel_QBD) = self.columns, queries
        q_BQHD, q_sel_BQD = jnp.moveaxis(q_QBHD, 0, 1), jnp.moveaxis(q_sel_QBD, 0, 1)
        (batch, num_queries, num_heads, head_dim), num_columns = q_BQHD.shape, columns.position.shape[1]
        rule = Rule(head_dim**-0.5, self.selection)
        s_QBM = logits_QBHM = None
        if self.selection is not Selection.OFF:
            keys = Keys(jnp.arange(num_columns, dtype=jnp.int32), columns.position == 0, None, None)
            asking = Queries(self.num_held + t_Q, None)
            s_QBM = jnp.moveaxis(select(q_sel_BQD, self.k_sel, asking, keys, rule), 1, 0)
        if self.policy.keeps_score:
            q_BQKGD = q_BQHD.reshape(batch, num_queries, columns.k.shape[2], -1, head_dim)
            dtype = jnp.promote_types(q_BQHD.dtype, jnp.float32)
            logits = rule.scale * jnp.einsum("bqkgd,bmkd->bkgqm", q_BQKGD, columns.k, preferred_element_type=dtype)
            logits_QBHM = jnp.moveaxis(logits.reshape(batch, num_heads, num_queries, num_columns), 2, 0)
        carry, _ = jax.lax.scan(self._query, carry, (t_Q, s_QBM, logits_QBHM))
        return carry

    def _query(self, carry: _Carry, query: tuple[Array, Any, Any]) -> tuple[_Carry, None]:
        """Makes room for one token a row if there is none, then lets its query see, score and select."""
        columns, arriving = self.columns, self.arriving
        evict_at_BM, f_BM, score_BM = carry
        t, s_BM, logits_BHM = query  # S where the model selects, logits where the policy scores
        column_M = jnp.arange(columns.position.shape[1], dtype=jnp.int32)
        column, now_B1, budget_B1 = self.num_held + t, arriving.start[:, None] + t, arriving.budget[:, None]
        real_B1 = t < arriving.num_tokens[:, None]
        here_BM = (evict_at_BM == NEVER) & (columns.position >= 0) & (column_M < column)
        held = Held(columns.position, f_BM, score_BM, now_B1, budget_B1, arriving.layer)
        full_B1 = now_B1 >= budget_B1  # before position i, i tokens have come
        if self.policy.shrinks:
            forgotten_BM = here_BM & real_B1 & self.policy.forgets(held)
            evict_at_BM, here_BM = jnp.where(forgotten_BM, column, evict_at_BM), here_BM & ~forgotten_BM
            full_B1 = jnp.sum(here_BM, axis=1, keepdims=True) >= budget_B1
        priority_BM = jnp.where(here_BM & (columns.position > 0), self.policy.priority(held), -jnp.inf)
        leaves_BM = column_M == victim(priority_BM, columns.position)[:, None]
        leaves_BM &= real_B1 & full_B1
        evict_at_BM = jnp.where(leaves_BM, column, evict_at_BM)
        if score_BM is not None:
            seen_BM = (here_BM & ~leaves_BM) | (column_M == column)
            f_B1M = 0 if f_BM is None else f_BM[:, None]
            weights_BHM = jax.nn.softmax(jnp.where(seen_BM[:, None], logits_BHM - f_B1M, -HIDDEN), axis=-1)
            weights_BM = over_heads(jnp.mean(weights_BHM, axis=1), self.heads_axis)
            score_BM = jnp.where(real_B1, self.policy.observe(score_BM, weights_BM), score_BM)
        if f_BM is not None:
            f_BM = f_BM + jnp.where(real_B1, s_BM, 0)
        return (evict_at_BM, f_BM, score_BM), None


def over_heads(mean_BM: Array, heads_axis: str | None) -> Array:
    """The mean over all heads, from the mean over one shard's."""
    return mean_BM if heads_axis is None else jax.lax.pmean(mean_BM, heads_axis)


def heads_as_rows(x: Array, groups: int) -> Array:
    """[B, T, heads, D] -> [B * R, T, heads / R, D], for R groups of heads."""
    batch, length, heads, width = x.shape
    split = jnp.moveaxis(x.reshape(batch, length, groups, heads // groups, width), 2, 1)
    return split.reshape(batch * groups, length, heads // groups, width)


def _rows_as_heads(x: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `heads_as_rows`."""
    groups = x.shape[0] // shape[0]
    return jnp.moveaxis(x.reshape(shape[0], groups, *x.shape[1:]), 1, 2).reshape(shape)
