"""The definition of the mask F, and the rules that it can follow.

Paper: "Selective Attention Improves Transformer" (arXiv 2410.02703), section 3.

Shape letters: B batch, N queries, M keys, D head width.
"""

import enum

import jax
import jax.numpy as jnp
from jax import Array


class Selection(enum.StrEnum):
    """What selects: the paper's rule, or one of its ablations. Each changes one line of the definition of S."""

    PAPER = "paper"
    UNPROTECTED_BOS = "unprotected_bos"  # the first token of a sequence can be masked
    UNPROTECTED_SELF = "unprotected_self"  # a token can mask itself, for later queries
    LEAKY = "leaky"  # leaky ReLU of slope 0.01: attention can be boosted a little
    OWN_HEAD = "own_head"  # the selecting logits have projections of their own, instead of head 0's
    OFF = "off"  # standard attention


def selection_mask(
    q: Array,
    k: Array,
    *,
    scale: float = 1.0,
    segment_ids: Array | None = None,
    selection: Selection = Selection.PAPER,
) -> Array:
    """The mask F that selective attention subtracts from every head's logits: the readable definition, and the oracle.

    With `L = scale * q k^T`: `S = relu(L)`, zero in column 0 (<BOS>), on the diagonal and above it;
    `F[i, j] = sum_{k=j+1}^{i-1} S[k, j]`, a choice made by query k acting on strictly later queries (section 3).

    Args:
      q, k: [B, N, D] of the selecting head.
      scale: factor on the logits; 1.0 for a q that is already scaled.
      segment_ids: int32 [B, N]; tokens select only within their segment. Negative ids are padding.
      selection: the paper's rule or an ablation.

    Returns:
      F [B, N, N], float32 (float64 for float64 inputs); 0 above the diagonal.
    """
    length = q.shape[1]
    if selection is Selection.OFF:
        return jnp.zeros((q.shape[0], length, length), jnp.promote_types(q.dtype, jnp.float32))
    s_BNM = select(q, k, 0, segment_ids, segment_ids, scale, selection)
    f_BNM = jnp.cumsum(s_BNM, axis=1) - s_BNM  # over queries (axis 1), exclusive: query i does not act on itself
    return jnp.where(jnp.tri(length, dtype=bool), f_BNM, 0)


def select(
    q: Array,
    k: Array,
    offset: Array | int,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    scale: float,
    selection: Selection,
) -> Array:
    """S of section 3, [B, N, M] float32: how much the query at `offset + n` masks each key for later queries."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits_BNM = scale * jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=dtype)
    position_N, kv_position_M = offset + jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    first_BM = first_of_segment(kv_segment_ids, k.shape[1])
    allowed_BNM = selectable(position_N, kv_position_M, q_segment_ids, kv_segment_ids, first_BM, selection)
    return jnp.where(allowed_BNM, rectify(logits_BNM, selection), 0)


def rectify(logits: Array, selection: Selection) -> Array:
    """How much a logit selects: never less than nothing, so that attention is only ever reduced (but for LEAKY)."""
    return jax.nn.leaky_relu(logits, 0.01) if selection is Selection.LEAKY else jax.nn.relu(logits)


def selectable(
    q_position_N: Array,
    kv_position_M: Array,
    q_segment_BN: Array | None,
    kv_segment_BM: Array | None,
    first_BM: Array,
    selection: Selection,
) -> Array:
    """Bool [B or 1, N, M]: the pairs (query, key) whose S may differ from zero. `first_BM` as by `first_of_segment`."""
    query_N1, key_M = q_position_N[:, None], kv_position_M[None, :]
    allowed_NM = query_N1 >= key_M if selection is Selection.UNPROTECTED_SELF else query_N1 > key_M
    allowed_BNM = allowed_NM[None] & _same_segment(q_segment_BN, kv_segment_BM)
    if selection is not Selection.UNPROTECTED_BOS:
        allowed_BNM &= ~first_BM[:, None, :]
    return allowed_BNM


def visible(
    q_position_N: Array,
    kv_position_M: Array,
    q_segment_BN: Array | None,
    kv_segment_BM: Array | None,
    evict_at_BM: Array | None,
) -> Array:
    """Bool [B or 1, N, M]: the pairs (query, key) where attention looks at all; F comes on top."""
    seen_BNM = (q_position_N[:, None] >= kv_position_M[None, :])[None] & _same_segment(q_segment_BN, kv_segment_BM)
    if evict_at_BM is not None:
        seen_BNM &= q_position_N[None, :, None] < evict_at_BM[:, None, :]
    return seen_BNM


def first_of_segment(segment_BM: Array | None, length: int) -> Array:
    """Bool [B, M] (B = 1 without segment ids): tokens protected like <BOS>, the first one of every segment."""
    start_BM = jnp.arange(length)[None] == 0
    if segment_BM is None:
        return start_BM
    return start_BM | (segment_BM != jnp.roll(segment_BM, 1, axis=1))


def _same_segment(q_segment_BN: Array | None, kv_segment_BM: Array | None) -> Array | bool:
    if q_segment_BN is None or kv_segment_BM is None:
        return True
    same_BNM = q_segment_BN[:, :, None] == kv_segment_BM[:, None, :]
    return same_BNM & (kv_segment_BM >= 0)[:, None, :]
