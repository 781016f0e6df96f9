"""The definition of the mask F, and the rules that it can follow.

Paper: "Selective Attention Improves Transformer" (arXiv 2410.02703), section 3.

Shape letters: the package's.
"""

import dataclasses
import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

# Finite stand-ins for infinity, so that a row with nothing to see stays free of NaN.
HIDDEN = 1e30  # F of a pair that attention does not look at: exp(logit - HIDDEN - maximum) is exactly 0
NOTHING_SEEN = -1e29  # a running maximum below this has met hidden pairs only
LEAKY_SLOPE = 0.01  # of the ablation LEAKY


class Selection(enum.StrEnum):
    """What selects: the paper's rule, or one of its ablations. Each changes one line of the definition of S."""

    PAPER = "paper"
    UNPROTECTED_BOS = "unprotected_bos"  # the first token of a sequence can be masked
    UNPROTECTED_SELF = "unprotected_self"  # a token can mask itself, for later queries
    LEAKY = "leaky"  # leaky ReLU: attention can be boosted a little
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
    seen = Seen.whole(segment_ids)
    s_BNM = select(q, k, seen.queries(length), seen.keys(length), Rule(scale, selection))
    f_BNM = jnp.cumsum(s_BNM, axis=1) - s_BNM  # over queries (axis 1), exclusive: query i does not act on itself
    return jnp.where(jnp.tri(length, dtype=bool), f_BNM, 0)


def forgotten_above(
    logit_bound: ArrayLike, length: int, selection: Selection = Selection.PAPER, dtype: DTypeLike = jnp.float32
) -> Array:
    """The F above which a key is forgotten for good: dropped, it is missed by no query to come, to rounding.

    No logit exceeds b in size and F never falls, while a query's own key, like <BOS>, keeps its whole logit: a key has
    at most the weight exp(2 b - F) in every later softmax. Above `2 b + 17 + ln N` (in float32) all such keys together
    weigh less than half a unit in the last place, e^-17 < 2^-24. Where a query may not see its own key, nothing bounds
    this. A model's b is `Block.logit_bound`.

    Args:
      logit_bound: b, which no |scale * q . k| of any head exceeds.
      length: N, of the context.
      selection: the rule; under `LEAKY` F can fall, and nothing is ever forgotten: infinity.
      dtype: of the softmax that cannot tell; bfloat16 forgets much earlier.

    Returns:
      Scalar, float32 (float64 for a float64 bound).
    """
    bound = jnp.asarray(logit_bound, jnp.promote_types(jnp.result_type(logit_bound), jnp.float32))
    if selection is Selection.LEAKY:
        return jnp.full_like(bound, jnp.inf)
    return 2 * bound + (1 - math.log(jnp.finfo(dtype).eps)) + math.log(length)


class Projections(NamedTuple):
    """What attention is computed from: N queries and M keys."""

    q: Array  # [B, N, H, D]
    k: Array  # [B, M, K, D]
    v: Array  # [B, M, K, D]
    q_sel: Array | None = None  # [B, N, D'] of the selecting head; None, as k_sel, where head 0 selects
    k_sel: Array | None = None  # [B, M, D']

    def selecting(self) -> tuple[Array, Array]:
        """The selecting head's own projections, or else those of head 0: [B, N, D'] and [B, M, D']."""
        if self.q_sel is None or self.k_sel is None:
            return self.q[:, :, 0], self.k[:, :, 0]
        return self.q_sel, self.k_sel


@dataclasses.dataclass(frozen=True)
class Rule:
    """By what rule queries attend and select; `selective_attention` describes the fields."""

    scale: float
    selection: Selection = Selection.PAPER
    tau: float | None = None  # `memory_tau` there
    logit_bound: Array | float | None = None


class Queries(NamedTuple):
    """What decides, apart from the logits, what a block of queries sees and selects."""

    position: Array  # int32 [N]
    segment: Array | None  # int32 [B, N]


class Keys(NamedTuple):
    """The same of a block of keys."""

    position: Array  # int32 [M]
    first: Array  # bool [B or 1, M]: protected like <BOS>, i.e. the first token of every segment
    segment: Array | None  # int32 [B, M]
    evict_at: Array | None  # int32 [B, M]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a block of queries may see: all keys, or their first ones, up to its own positions."""

    offset: Array | int = 0  # position of the first query, int32 scalar; keys start at 0
    q_segment_ids: Array | None = None  # int32 [B, N]
    kv_segment_ids: Array | None = None  # int32 [B, M]
    evict_at: Array | None = None  # int32 [B, M]

    @classmethod
    def whole(cls, segment_ids: Array | None = None, evict_at: Array | None = None) -> "Seen":
        """By a whole sequence, of itself."""
        return cls(0, segment_ids, segment_ids, evict_at)

    def queries(self, length: int) -> Queries:
        """The block's `length` queries."""
        return Queries(self.offset + jnp.arange(length, dtype=jnp.int32), self.q_segment_ids)

    def keys(self, length: int) -> Keys:
        """All `length` keys."""
        position_M, segment_ids = jnp.arange(length, dtype=jnp.int32), self.kv_segment_ids
        first_BM = position_M[None] == 0
        if segment_ids is not None:
            first_BM |= segment_ids != jnp.roll(segment_ids, 1, axis=1)
        return Keys(position_M, first_BM, segment_ids, self.evict_at)


def select(q_BND: Array, k_BMD: Array, queries: Queries, keys: Keys, rule: Rule) -> Array:
    """S of section 3, [B, N, M] float32: how much each query masks each key for later queries. B may be absent."""
    dtype = jnp.promote_types(q_BND.dtype, jnp.float32)
    logits_BNM = rule.scale * jnp.einsum("...nd,...md->...nm", q_BND, k_BMD, preferred_element_type=dtype)
    return selected(logits_BNM, queries, keys, rule)


def selected(logits_BNM: Array, queries: Queries, keys: Keys, rule: Rule) -> Array:
    """S from the selecting head's logits."""
    allowed_BNM = allowed(queries.position[:, None], keys.position, keys.first[..., None, :], rule.selection)
    return jnp.where(allowed_BNM & _same_segment(queries, keys), rectified(logits_BNM, rule.selection), 0)


def rectified(logits: Array, selection: Selection) -> Array:
    """Never negative, so that attention is only ever reduced (but for the ablation)."""
    return jax.nn.leaky_relu(logits, LEAKY_SLOPE) if selection is Selection.LEAKY else jax.nn.relu(logits)


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
