"""Selective attention as its definition reads, with arrays of N x M: the implementation that the others are held to.

Like every implementation it offers `attend` and `column_sums` for a block of queries `offset .. offset + N - 1` against
keys `0 .. M - 1`; on one device the block is the whole sequence.

Shape letters: B batch, N queries, M keys, H query heads, K key/value heads, G = H / K, D head width.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ..selection import Keys, Queries, Selection, select, selecting_head, visible

# Finite, so that a row with nothing to see stays free of NaN; exp(BIG_NEGATIVE - max) is exactly 0.
BIG_NEGATIVE = -1e30


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array | None,
    k_sel: Array | None,
    f_start: Array,
    *,
    offset: Array | int,
    evict_at: Array | None,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    scale: float,
    selection: Selection,
    tau: float | None,
    logit_bound: Array | float | None = None,
) -> tuple[Array, Array | None]:
    """Selective attention of a block of queries.

    Args:
      q: [B, N, H, D]; k, v: [B, M, K, D]; q_sel: [B, N, D'] and k_sel: [B, M, D'], or None for head 0.
      f_start: float32 [B, M], F at the block's first query: `column_sums` of all queries before it. Differentiable.
      offset: position of the first query, int32 scalar; keys start at 0. It may be traced.
      evict_at: int32 [B, M] or None; the segment ids: int32 [B, N] and [B, M], or None.
      scale, selection, tau, logit_bound: as in `selective_attention`, tau being its `memory_tau`.

    Returns:
      out [B, N, H, D] in q's dtype; forgotten [B, N] float32, or None without tau.
    """
    q_sel, k_sel = selecting_head(q, k, q_sel, k_sel)
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    queries, keys = Queries.at(offset, length, q_segment_ids), Keys.of(k.shape[1], kv_segment_ids, evict_at)
    if selection is Selection.OFF:
        f_BNM = jnp.zeros((batch, length, k.shape[1]), dtype)
    else:
        s_BNM = select(q_sel, k_sel, queries, keys, scale, selection)
        f_BNM = f_start[:, None, :] + jnp.cumsum(s_BNM, axis=1) - s_BNM  # exclusive: query i does not act on itself
    visible_BNM = jnp.broadcast_to(visible(queries, keys), f_BNM.shape)

    q_BNKGD = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits_BKGNM = scale * jnp.einsum("bnkgd,bmkd->bkgnm", q_BNKGD, k, preferred_element_type=dtype)
    logits_BKGNM = jnp.where(visible_BNM[:, None, None], logits_BKGNM - f_BNM[:, None, None], BIG_NEGATIVE)
    weights_BKGNM = jax.nn.softmax(logits_BKGNM, axis=-1) * visible_BNM.any(-1)[:, None, None, :, None]
    out_BNKGD = jnp.einsum("bkgnm,bmkd->bnkgd", weights_BKGNM.astype(v.dtype), v, preferred_element_type=dtype)
    out_BNHD = out_BNKGD.reshape(batch, length, num_heads, v.shape[-1]).astype(q.dtype)
    if tau is None:
        return out_BNHD, None
    return out_BNHD, jnp.where(visible_BNM, jnp.minimum(f_BNM, tau) / tau, 0).sum(-1)


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
    """What a block of queries adds to F for all later queries: the sum of S over its queries, float32 [B, M]."""
    queries, keys = Queries.at(offset, q_sel.shape[1], q_segment_ids), Keys.of(k_sel.shape[1], kv_segment_ids)
    return select(q_sel, k_sel, queries, keys, scale, selection).sum(axis=1)
