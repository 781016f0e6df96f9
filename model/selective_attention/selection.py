"""The definition of the mask F, and the rules that it can follow.

Paper: "Selective Attention Improves Transformer" (arXiv 2410.02703), section 3.

Shape letters: B batch, N queries, M keys, D head width.
"""

import enum
from typing import NamedTuple

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
    queries, keys = Queries.at(0, length, segment_ids), Keys.of(length, segment_ids)
    s_BNM = select(q, k, queries, keys, scale, selection)
    f_BNM = jnp.cumsum(s_BNM, axis=1) - s_BNM  # over queries (axis 1), exclusive: query i does not act on itself
    return jnp.where(jnp.tri(length, dtype=bool), f_BNM, 0)


class Queries(NamedTuple):
    """What decides, apart from the logits, what a block of queries sees and selects."""

    position: Array  # int32 [N]
    segment: Array | None  # int32 [B, N]

    @classmethod
    def at(cls, offset: Array | int, length: int, segment_ids: Array | None) -> "Queries":
        return cls(offset + jnp.arange(length, dtype=jnp.int32), segment_ids)


class Keys(NamedTuple):
    """The same of a block of keys."""

    position: Array  # int32 [M]
    first: Array  # bool [B or 1, M]: protected like <BOS>, i.e. the first token of every segment
    segment: Array | None  # int32 [B, M]
    evict_at: Array | None  # int32 [B, M]

    @classmethod
    def of(cls, length: int, segment_ids: Array | None, evict_at: Array | None = None) -> "Keys":
        """Of the whole sequence."""
        position_M = jnp.arange(length, dtype=jnp.int32)
        first_BM = position_M[None] == 0
        if segment_ids is not None:
            first_BM |= segment_ids != jnp.roll(segment_ids, 1, axis=1)
        return cls(position_M, first_BM, segment_ids, evict_at)


def selecting_head(q_BNHD: Array, k_BMKD: Array, q_sel: Array | None, k_sel: Array | None) -> tuple[Array, Array]:
    """The selecting head's own projections, [B, N, D'] and [B, M, D'], or else those of head 0."""
    if q_sel is None or k_sel is None:
        return q_BNHD[:, :, 0], k_BMKD[:, :, 0]
    return q_sel, k_sel


def select(q_BND: Array, k_BMD: Array, queries: Queries, keys: Keys, scale: float, selection: Selection) -> Array:
    """S of section 3, [B, N, M] float32: how much each query masks each key for later queries. B may be absent."""
    dtype = jnp.promote_types(q_BND.dtype, jnp.float32)
    logits_BNM = scale * jnp.einsum("...nd,...md->...nm", q_BND, k_BMD, preferred_element_type=dtype)
    allowed_BNM = allowed(queries.position[:, None], keys.position, keys.first[..., None, :], selection)
    return jnp.where(allowed_BNM & _same_segment(queries, keys), rectified(logits_BNM, selection), 0)


def rectified(logits: Array, selection: Selection) -> Array:
    """Never negative, so that attention is only ever reduced (but for the ablation)."""
    return jax.nn.leaky_relu(logits, 0.01) if selection is Selection.LEAKY else jax.nn.relu(logits)


def allowed(query: Array, key: Array, first: Array, selection: Selection) -> Array:
    """Where a query at one position may mask a key at another, `first` being the tokens protected like <BOS>."""
    earlier = query >= key if selection is Selection.UNPROTECTED_SELF else query > key
    return earlier if selection is Selection.UNPROTECTED_BOS else earlier & ~first


def visible(queries: Queries, keys: Keys) -> Array:
    """Bool [N, M], or [B, N, M] if it depends on the sequence: where attention looks at all; F comes on top."""
    seen_BNM = (queries.position[:, None] >= keys.position) & _same_segment(queries, keys)
    if keys.evict_at is not None:
        seen_BNM &= queries.position[:, None] < keys.evict_at[..., None, :]
    return seen_BNM


def _same_segment(queries: Queries, keys: Keys) -> Array:
    if queries.segment is None or keys.segment is None:
        return jnp.ones((1, 1), bool)
    same_BNM = queries.segment[..., :, None] == keys.segment[..., None, :]
    return same_BNM & (keys.segment >= 0)[..., None, :]
