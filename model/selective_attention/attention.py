"""Selective attention: the function that everyone calls, and the choice of its implementation.

Paper: "Selective Attention Improves Transformer" (arXiv 2410.02703), section 3; the definition is in `selection.py`.

Shape letters: the package's.
"""

from types import ModuleType
from typing import TypedDict

import jax.numpy as jnp
from jax import Array

from .implementations import NAMES, blockwise, implementation_name, reference
from .implementations.tpu import attend as pallas_tpu
from .selection import Projections, Rule, Seen, Selection, selection_mask

__all__ = ["Selection", "selection_mask", "selective_attention"]

_MODULES = dict(zip(NAMES, (reference, blockwise, pallas_tpu), strict=True))


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of `selective_attention`, which describes them."""

    q_sel: Array | None
    k_sel: Array | None
    scale: float | None
    evict_at: Array | None
    segment_ids: Array | None
    selection: Selection
    memory_tau: float | None
    logit_bound: Array | float | None
    implementation: str | None


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
    logit_bound: Array | float | None = None,
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
      logit_bound: float32 scalar that no |scale * q . k| exceeds, if one is known: it saves "pallas" from looking.
        `math.inf` keeps "xla" from dropping keys that are forgotten for good (`forgotten_above`).
      implementation: "pallas" (fused TPU kernels; head widths up to 128), "xla" (in blocks, memory linear in N),
        "reference" (the definition, arrays of N x N), or None for "pallas" on TPU and "xla" elsewhere.

    Returns:
      out [B, N, H, D] in q's dtype; with `memory_tau` the pair (out, forgotten), forgotten float32 [B, N]:
      `forgotten[i] = (1 / tau) * sum_k min(F[i, k], tau)` over the keys k that query i sees, so that section 3's
      `M[i] = (i + 1) - forgotten[i]` (i from 0, counted within the segment).

    Raises:
      ValueError: shapes that do not fit together, missing `q_sel, k_sel`, or an unknown implementation.
    """
    options = AttentionOptions(
        q_sel=q_sel,
        k_sel=k_sel,
        scale=scale,
        evict_at=evict_at,
        segment_ids=segment_ids,
        selection=selection,
        memory_tau=memory_tau,
        logit_bound=logit_bound,
    )
    out, forgotten = attend_whole(*checked(q, k, v, options), implementation)
    return out if forgotten is None else (out, forgotten)


def attend_whole(
    projections: Projections, seen: Seen, rule: Rule, implementation: str | None
) -> tuple[Array, Array | None]:
    """Attention of whole sequences to themselves on one device: (out, forgotten), the latter None without tau."""
    k = projections.k
    f_start = jnp.zeros(k.shape[:2], jnp.promote_types(projections.q.dtype, jnp.float32))
    return implementation_module(implementation).attend(projections, f_start, seen, rule)


def implementation_module(implementation: str | None) -> ModuleType:
    """The module whose `attend` and `column_sums` do the work; errors as `implementation_name`."""
    return _MODULES[implementation_name(implementation)]


def checked(q: Array, k: Array, v: Array, options: AttentionOptions) -> tuple[Projections, Seen, Rule]:
    """What implementations are told of a call of `selective_attention`.

    Raises:
      ValueError: the arguments do not fit together; the message names the shapes.
      TypeError: there is no such option.
    """
    if unknown := options.keys() - AttentionOptions.__annotations__:
        known = ", ".join(AttentionOptions.__annotations__)
        raise TypeError(f"there is no keyword argument {min(unknown)!r}; choose from {known}")
    projections = Projections(q, k, v, options.get("q_sel"), options.get("k_sel"))
    seen = Seen.whole(options.get("segment_ids"), options.get("evict_at"))
    selection, scale = Selection(options.get("selection", Selection.PAPER)), options.get("scale")
    _check_projections(projections, selection)
    batch, length, _, head_dim = q.shape
    for name, array in (("evict_at", seen.evict_at), ("segment_ids", seen.q_segment_ids)):
        if array is not None and (array.shape != (batch, length) or not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"{name} must be an integer array [{batch}, {length}]; got {array.dtype} {array.shape}")
    scale = head_dim**-0.5 if scale is None else scale
    return projections, seen, Rule(scale, selection, options.get("memory_tau"), options.get("logit_bound"))


def _check_projections(projections: Projections, selection: Selection) -> None:
    q, k, v, q_sel, k_sel = projections
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v must be [B, N, heads, D]; got shapes {q.shape}, {k.shape}, {v.shape}")
    batch, length, num_heads, head_dim = q.shape
    if k.shape[:2] != (batch, length) or k.shape[3] != head_dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v do not fit q: q {q.shape}, k {k.shape}, v {v.shape}")
    if num_heads % k.shape[2]:
        raise ValueError(f"the {k.shape[2]} key/value heads must divide the {num_heads} query heads")
    if (q_sel is None) != (k_sel is None):
        raise ValueError("give both q_sel and k_sel, or neither")
    if q_sel is None and selection is Selection.OWN_HEAD:
        raise ValueError("selection 'own_head' needs the projections q_sel and k_sel; without them head 0 would select")
    if q_sel is not None and k_sel is not None and (q_sel.shape[:2] != (batch, length) or q_sel.shape != k_sel.shape):
        raise ValueError(f"q_sel and k_sel must be [{batch}, {length}, D]; got {q_sel.shape} and {k_sel.shape}")
