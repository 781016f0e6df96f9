"""Selective attention as its definition reads, with arrays of N x M: the implementation that the others are held to.

Like every implementation it offers `attend` and `column_sums` for a block of queries `offset .. offset + N - 1` against
keys `0 .. M - 1`; on one device the block is the whole sequence.

Shape letters: the package's.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ..selection import HIDDEN, Projections, Rule, Seen, Selection, select, visible


def attend(projections: Projections, f_start: Array, seen: Seen, rule: Rule) -> tuple[Array, Array | None]:
    """Selective attention of a block of queries.

    Args:
      projections: q, k, v, and the selecting head's q and k if it has its own.
      f_start: float32 [B, M], F at the block's first query: `column_sums` of all queries before it. Differentiable.
      seen: which keys; its offset may be traced.
      rule: scale, selection, tau; a bound of the logits, if one is known, may save work.

    Returns:
      out [B, N, H, D] in q's dtype; forgotten [B, N] float32, or None without tau.
    """
    q, k, v = projections[:3]
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    queries, keys = seen.queries(length), seen.keys(k.shape[1])
    if rule.selection is Selection.OFF:
        f_BNM = jnp.zeros((batch, length, k.shape[1]), dtype)
    else:
        s_BNM = select(*projections.selecting(), queries, keys, rule)
        f_BNM = f_start[:, None, :] + jnp.cumsum(s_BNM, axis=1) - s_BNM  # exclusive: query i does not act on itself
    visible_BNM = jnp.broadcast_to(visible(queries, keys), f_BNM.shape)

    q_BNKGD = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits_BKGNM = rule.scale * jnp.einsum("bnkgd,bmkd->bkgnm", q_BNKGD, k, preferred_element_type=dtype)
    logits_BKGNM = jnp.where(visible_BNM[:, None, None], logits_BKGNM - f_BNM[:, None, None], -HIDDEN)
    weights_BKGNM = jax.nn.softmax(logits_BKGNM, axis=-1) * visible_BNM.any(-1)[:, None, None, :, None]
    out_BNKGD = jnp.einsum("bkgnm,bmkd->bnkgd", weights_BKGNM.astype(v.dtype), v, preferred_element_type=dtype)
    out_BNHD = out_BNKGD.reshape(batch, length, num_heads, v.shape[-1]).astype(q.dtype)
    if rule.tau is None:
        return out_BNHD, None
    return out_BNHD, jnp.where(visible_BNM, jnp.minimum(f_BNM, rule.tau) / rule.tau, 0).sum(-1)


def column_sums(q_sel: Array, k_sel: Array, seen: Seen, rule: Rule) -> Array:
    """What a block of queries adds to F for all later queries: the sum of S over its queries, float32 [B, M].

    `q_sel` [B, N, D'] and `k_sel` [B, M, D'] are the selecting head's; evictions do not matter.
    """
    return select(q_sel, k_sel, seen.queries(q_sel.shape[1]), seen.keys(k_sel.shape[1]), rule).sum(axis=1)
