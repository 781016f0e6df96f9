"""Independent forms of the definition in float64 numpy, which every implementation is compared with.

`literal` is section 3 of the paper as nested loops over (batch, query, key, selecting query). `streaming` is the
recurrence with one vector f per sequence, for lengths at which the loops are too slow; it is compared with `literal`.
Neither shares code with the package.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """The selection rule in elementary switches."""

    slope: float = 0.0  # of the negative side
    protect_bos: bool = True
    protect_self: bool = True
    off: bool = False


RULES = {
    "paper": Rule(),
    "unprotected_bos": Rule(protect_bos=False),
    "unprotected_self": Rule(protect_self=False),
    "leaky": Rule(slope=0.01),
    "own_head": Rule(),
    "off": Rule(off=True),
}


def make_inputs(seed, batch=2, length=7, heads=3, kv_heads=None, width=4, value_width=None, dtype=np.float64):
    """Random q [B, N, H, D], k [B, N, K, D], v [B, N, K, Dv]."""
    rng = np.random.default_rng(seed)
    kv_heads = kv_heads or heads
    q = rng.normal(size=(batch, length, heads, width))
    k = rng.normal(size=(batch, length, kv_heads, width))
    v = rng.normal(size=(batch, length, kv_heads, value_width or width))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def segment_start(segment_ids, position):
    """First position of the segment that `position` lies in; segment_ids [N] or None."""
    start = position
    while start > 0 and (segment_ids is None or segment_ids[start - 1] == segment_ids[position]):
        start -= 1
    return start


def _same_segment(segment_ids, i, j):
    return segment_ids is None or (segment_ids[i] == segment_ids[j] and segment_ids[j] >= 0)


def literal_mask(q_sel, k_sel, scale, segment_ids=None, rule=Rule()):
    """F [B, N, N] by the definition, one scalar at a time."""
    batch, length, _ = q_sel.shape
    mask = np.zeros((batch, length, length))
    if rule.off:
        return mask
    for b in range(batch):
        ids = None if segment_ids is None else segment_ids[b]
        for i in range(length):
            for j in range(i + 1):
                if rule.protect_bos and segment_start(ids, j) == j:
                    continue
                first = j + 1 if rule.protect_self else j
                for query in range(first, i):
                    if _same_segment(ids, query, j):
                        logit = scale * float(np.dot(q_sel[b, query], k_sel[b, j]))
                        mask[b, i, j] += logit if logit > 0 else rule.slope * logit
    return mask


def literal(q, k, v, *, q_sel=None, k_sel=None, scale=None, segment_ids=None, evict_at=None, rule=Rule(), tau=1.0):
    """(out [B, N, H, Dv], forgotten [B, N]) by the definition."""
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    q_sel = q[:, :, 0] if q_sel is None else q_sel
    k_sel = k[:, :, 0] if k_sel is None else k_sel
    mask = literal_mask(q_sel, k_sel, scale, segment_ids, rule)
    out = np.zeros((batch, length, heads, v.shape[-1]))
    forgotten = np.zeros((batch, length))
    for b in range(batch):
        ids = None if segment_ids is None else segment_ids[b]
        for i in range(length):
            seen = [j for j in range(i + 1) if _same_segment(ids, i, j) and (evict_at is None or i < evict_at[b, j])]
            if not seen:
                continue
            forgotten[b, i] = sum(min(mask[b, i, j], tau) / tau for j in seen)
            for h in range(heads):
                logits = np.array([scale * np.dot(q[b, i, h], k[b, j, h // group]) - mask[b, i, j] for j in seen])
                weights = np.exp(logits - logits.max())
                out[b, i, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out, forgotten


def streaming(q, k, v, *, q_sel=None, k_sel=None, scale=None, segment_ids=None, evict_at=None, rule=Rule(), tau=1.0):
    """The same as `literal`, row after row with f [B, N], as a decoder would do it."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    q_sel = np.asarray(q[:, :, 0] if q_sel is None else q_sel, np.float64)
    k_sel = np.asarray(k[:, :, 0] if k_sel is None else k_sel, np.float64)
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    ids = np.zeros((batch, length), int) if segment_ids is None else np.asarray(segment_ids)
    first = np.ones((batch, length), bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    out = np.zeros((batch, length, heads, v.shape[-1]))
    forgotten = np.zeros((batch, length))
    f = np.zeros((batch, length))
    for i in range(length):
        m = i + 1
        same = (ids[:, :m] == ids[:, i : i + 1]) & (ids[:, :m] >= 0)
        seen = same if evict_at is None else same & (i < evict_at[:, :m])
        logits = scale * np.einsum("bhd,bmhd->bhm", q[:, i], k[:, :m]) - f[:, None, :m]
        logits = np.where(seen[:, None], logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
        total = weights.sum(-1, keepdims=True)
        out[:, i] = np.einsum("bhm,bmhd->bhd", weights / np.where(total == 0, 1, total), v[:, :m])
        forgotten[:, i] = (np.minimum(f[:, :m], tau) / tau * seen).sum(-1)
        if not rule.off:
            s = scale * np.einsum("bd,bmd->bm", q_sel[:, i], k_sel[:, :m])
            s = np.where(s > 0, s, rule.slope * s) * same
            if rule.protect_bos:
                s[first[:, :m]] = 0
            if rule.protect_self:
                s[:, i] = 0
            f[:, :m] += s
    return out, forgotten
