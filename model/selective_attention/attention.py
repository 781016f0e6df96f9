"""Selective attention: the definition, and the function that dispatches to its implementations.

Paper: "Selective Attention Improves Transformer" (arXiv 2410.02703), section 3.

Shape letters: B batch, N queries, M keys, H query heads, K key/value heads (K divides H), G = H / K, D head width.
"""

import enum

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a row with nothing to see stays free of NaN; exp(BIG_NEGATIVE - max) is exactly 0.
BIG_NEGATIVE = -1e30


class Selection(enum.StrEnum):
    """What selects: the paper's rule, or one of its ablations. Each changes one line of the definition of S."""

    PAPER = "paper"
    UNPROTECTED_BOS = "unprotected_bos"  # the first token of a sequence can be masked
    UNPROTECTED_SELF = "unprotected_self"  # a token can mask itself, for later queries
    LEAKY = "leaky"  # leaky ReLU of slope 0.01: attention can be boosted a little
    OWN_HEAD = "own_head"  # the selecting logits have projections of their own, instead of head 0's
    OFF = "off"  # standard attention


def selection_logits_to_s(
    logits_BNM: Array, q_position_N: Array, kv_position_M: Array, first_of_segment_BM: Array, selection: Selection
) -> Array:
    """S of section 3 from the selecting head's logits; zero wherever no selection happens.

    Args:
      logits_BNM: scaled logits of the selecting head, float.
      q_position_N, kv_position_M: int32 positions of the queries and the keys in the sequence.
      first_of_segment_BM: bool, keys that are protected like <BOS>; B may be 1.
      selection: the rule.
    """
    s_BNM = jax.nn.leaky_relu(logits_BNM, 0.01) if selection is Selection.LEAKY else jax.nn.relu(logits_BNM)
    before_NM = q_position_N[:, None] > kv_position_M[None, :]
    if selection is Selection.UNPROTECTED_SELF:
        before_NM |= q_position_N[:, None] == kv_position_M[None, :]
    allowed_BNM = before_NM[None]
    if selection is not Selection.UNPROTECTED_BOS:
        allowed_BNM = allowed_BNM & ~first_of_segment_BM[:, None, :]
    return jnp.where(allowed_BNM, s_BNM, 0)


def first_of_segment(segment_ids_BN: Array | None, length: int) -> Array:
    """Bool [B, N] (B = 1 without segment ids): tokens protected like <BOS>, i.e. the first one of every segment."""
    start = jnp.arange(length)[None] == 0
    if segment_ids_BN is None:
        return start
    changed = segment_ids_BN != jnp.roll(segment_ids_BN, 1, axis=1)
    return start | changed


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
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    if selection is Selection.OFF:
        return jnp.zeros((q.shape[0], length, length), dtype)
    logits_BNM = scale * jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=dtype)
    position_N = jnp.arange(length)
    s_BNM = selection_logits_to_s(logits_BNM, position_N, position_N, first_of_segment(segment_ids, length), selection)
    if segment_ids is not None:
        s_BNM = jnp.where(_same_segment(segment_ids, segment_ids), s_BNM, 0)
    f_BNM = jnp.cumsum(s_BNM, axis=1) - s_BNM  # over queries (axis 1), exclusive: query i does not act on itself
    return jnp.where((position_N[:, None] >= position_N[None, :])[None], f_BNM, 0)


def selective_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_sel: Array | None = None,
    k_sel: Array | None = None,
    scale: float | None = None,
    evict_at: Array | None = None,
    segment_ids: Array | None = None,
    selection: Selection = Selection.PAPER,
    memory_tau: float | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Causal selective attention: `softmax(q k^T * scale - F) v`, with F from the selecting head (section 3).

    Args:
      q: [B, N, H, D] queries.
      k, v: [B, N, K, D] keys and values, K dividing H (grouped-query attention; query head h reads head h // (H / K)).
      q_sel, k_sel: [B, N, D'] of the selecting head; by default query head 0 and the key head that it reads.
      scale: factor on all logits; by default D ** -0.5.
      evict_at: int32 [B, N]; key j is visible to query i only while `i < evict_at[j]` (context pruning).
      segment_ids: int32 [B, N] of packed documents: attention and selection stop at a segment's borders, whose first
        token is protected like <BOS>. Equal ids must be contiguous. Negative ids are padding: seen by nobody,
        selecting nothing, their outputs zero.
      selection: the paper's rule, an ablation, or `Selection.OFF` for standard attention.
      memory_tau: if given, also return the memory statistic of section 3's auxiliary loss.
      implementation: "reference" (N x N arrays; the definition), or None for the best one of the platform.

    Returns:
      out [B, N, H, D] in q's dtype; with `memory_tau` the pair (out, forgotten), forgotten float32 [B, N]:
      `forgotten[i] = (1 / tau) * sum_k min(F[i, k], tau)` over the keys k that query i sees, so that section 3's
      `M[i] = (i + 1) - forgotten[i]` (i from 0, counted within the segment).

    Raises:
      ValueError: shapes that do not fit together, missing `q_sel, k_sel`, or an unknown implementation.
    """
    selection = Selection(selection)
    _check_shapes(q, k, v, q_sel, k_sel, evict_at, segment_ids)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if q_sel is None and selection is Selection.OWN_HEAD:
        raise ValueError("selection 'own_head' needs the projections q_sel and k_sel; without them head 0 would select")
    q_sel = q[:, :, 0] if q_sel is None else q_sel
    k_sel = k[:, :, 0] if k_sel is None else k_sel
    implementation = implementation or "reference"
    if implementation != "reference":
        raise ValueError(f"implementation={implementation!r} is unknown; choose 'reference' or None")
    options = {"scale": scale, "evict_at": evict_at, "segment_ids": segment_ids, "selection": selection}
    out, forgotten = reference_attention(q, k, v, q_sel, k_sel, tau=memory_tau, **options)
    return out if memory_tau is None else (out, forgotten)


def reference_attention(
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array,
    k_sel: Array,
    *,
    scale: float,
    evict_at: Array | None,
    segment_ids: Array | None,
    selection: Selection,
    tau: float | None,
) -> tuple[Array, Array | None]:
    """The definition, with N x N arrays; arguments as in `selective_attention`. Returns (out, forgotten or None)."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    f_BNM = selection_mask(q_sel, k_sel, scale=scale, segment_ids=segment_ids, selection=selection)

    position_N = jnp.arange(length)
    visible_BNM = (position_N[:, None] >= position_N[None, :])[None]
    if segment_ids is not None:
        visible_BNM = visible_BNM & _same_segment(segment_ids, segment_ids)
    if evict_at is not None:
        visible_BNM = visible_BNM & (position_N[None, :, None] < evict_at[:, None, :])

    q_BNKGD = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits_BKGNM = scale * jnp.einsum("bnkgd,bmkd->bkgnm", q_BNKGD, k, preferred_element_type=dtype)
    logits_BKGNM = jnp.where(visible_BNM[:, None, None], logits_BKGNM - f_BNM[:, None, None], BIG_NEGATIVE)
    weights_BKGNM = jax.nn.softmax(logits_BKGNM, axis=-1) * visible_BNM.any(-1)[:, None, None, :, None]
    out_BNKGD = jnp.einsum("bkgnm,bmkd->bnkgd", weights_BKGNM.astype(v.dtype), v, preferred_element_type=dtype)
    out_BNHD = out_BNKGD.reshape(batch, length, num_heads, v.shape[-1]).astype(q.dtype)
    if tau is None:
        return out_BNHD, None
    return out_BNHD, jnp.where(visible_BNM, jnp.minimum(f_BNM, tau) / tau, 0).sum(-1)


def _same_segment(q_segment_BN: Array, kv_segment_BM: Array) -> Array:
    same_BNM = q_segment_BN[:, :, None] == kv_segment_BM[:, None, :]
    return same_BNM & (kv_segment_BM >= 0)[:, None, :]


def _check_shapes(q, k, v, q_sel, k_sel, evict_at, segment_ids) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v must be [B, N, heads, D]; got shapes {q.shape}, {k.shape}, {v.shape}")
    batch, length, num_heads, head_dim = q.shape
    if k.shape[:2] != (batch, length) or k.shape[3] != head_dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v do not fit q: q {q.shape}, k {k.shape}, v {v.shape}")
    if num_heads % k.shape[2]:
        raise ValueError(f"the {k.shape[2]} key/value heads must divide the {num_heads} query heads")
    if (q_sel is None) != (k_sel is None):
        raise ValueError("give both q_sel and k_sel, or neither")
    if q_sel is not None and k_sel is not None and (q_sel.shape[:2] != (batch, length) or q_sel.shape != k_sel.shape):
        raise ValueError(f"q_sel and k_sel must be [{batch}, {length}, D]; got {q_sel.shape} and {k_sel.shape}")
    for name, array in (("evict_at", evict_at), ("segment_ids", segment_ids)):
        if array is not None and (array.shape != (batch, length) or not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"{name} must be an integer array [{batch}, {length}]; got {array.dtype} {array.shape}")
