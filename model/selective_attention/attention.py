"""Selective attention: the function that everyone calls, and the choice of its implementation.

Paper: "Selective Attention Improves Transformer" (arXiv 2410.02703), section 3; the definition is in `selection.py`.

Shape letters: B batch, N positions, H query heads, K key/value heads (K divides H), D head width.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from .implementations import blockwise, reference
from .implementations.tpu import attend as pallas_tpu
from .selection import Selection, selection_mask

__all__ = ["Selection", "selection_mask", "selective_attention"]


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
      implementation: "pallas" (fused TPU kernels; head widths up to 128), "xla" (in blocks, memory linear in N),
        "reference" (the definition, arrays of N x N), or None for "pallas" on TPU and "xla" elsewhere.

    Returns:
      out [B, N, H, D] in q's dtype; with `memory_tau` the pair (out, forgotten), forgotten float32 [B, N]:
      `forgotten[i] = (1 / tau) * sum_k min(F[i, k], tau)` over the keys k that query i sees, so that section 3's
      `M[i] = (i + 1) - forgotten[i]` (i from 0, counted within the segment).

    Raises:
      ValueError: shapes that do not fit together, missing `q_sel, k_sel`, or an unknown implementation.
    """
    selection = Selection(selection)
    check_arguments(q, k, v, q_sel, k_sel, evict_at, segment_ids, selection)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out, forgotten = implementation_module(implementation).attend(
        q,
        k,
        v,
        q_sel,
        k_sel,
        jnp.zeros(k.shape[:2], jnp.promote_types(q.dtype, jnp.float32)),
        offset=0,
        evict_at=evict_at,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        scale=scale,
        selection=selection,
        tau=memory_tau,
        logit_bound=logit_bound,
    )
    return out if memory_tau is None else (out, forgotten)


def implementation_module(name: str | None) -> ModuleType:
    """The module whose `attend` and `column_sums` do the work; None is the best one of the platform.

    Raises:
      ValueError: an unknown name.
    """
    if name is None:
        name = "pallas" if jax.default_backend() == "tpu" else "xla"
    modules = {"reference": reference, "xla": blockwise, "pallas": pallas_tpu}
    if name not in modules:
        raise ValueError(f"implementation={name!r} is unknown; choose 'reference', 'xla', 'pallas' or None")
    return modules[name]


def check_arguments(
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array | None,
    k_sel: Array | None,
    evict_at: Array | None,
    segment_ids: Array | None,
    selection: Selection,
) -> None:
    """Raises ValueError, which names the shapes, where the arguments of `selective_attention` do not fit together."""
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
    for name, array in (("evict_at", evict_at), ("segment_ids", segment_ids)):
        if array is not None and (array.shape != (batch, length) or not jnp.issubdtype(array.dtype, jnp.integer)):
            raise ValueError(f"{name} must be an integer array [{batch}, {length}]; got {array.dtype} {array.shape}")
