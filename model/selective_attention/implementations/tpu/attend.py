"""Selective attention as fused TPU kernels: `implementation="pallas"`.

Nothing of size N x M reaches HBM in either direction. The forward pass keeps, besides its output, one log-sum per query
and head and F at the start of every block of queries ([B, N / block, M]); the backward pass recomputes the tiles.
The kernels are in `forward.py` and `backward.py`, their tiles by generation of TPU in
`plan.py`; here are the `custom_vjp` around them and the layouts that they read. On other platforms than TPU
the same kernels run interpreted, slowly.

Shape letters: as in `columns.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from ...remat import keep
from ...selection import Projections, Rule, Seen, Selection
from ..blockwise import column_sums
from ..living import reach
from .backward import backward
from .columns import LANES, from_columns, pad, shuffle, to_columns
from .forward import forward
from .plan import KernelPlan, make_plan, most_queries
from .program import on_platform
from .steps import Steps
from .tile import LOG2_E

__all__ = ["attend", "column_sums"]  # the sums are one head's work, and small beside the kernel's: XLA does them

# Logits (in base 2) of at most this size need no running maximum: sums of exp2 stay inside float32.
LOGIT_BOUND = 60.0
# What belongs to queries, in and out of the backward kernel, and its axis of positions.
QUERY_AXES = {"q": 2, "d_out": 2, "log_sum": 3, "delta": 3, "q_sel": 2, "f_blocks": 2}
QUERY_AXES |= {"d_forgotten": 2, "q_segment": 2, "dq": 2, "dq_sel": 3}


def attend(projections: Projections, f_start: Array, seen: Seen, rule: Rule) -> tuple[Array, Array | None]:
    """Selective attention of a block of queries; arguments and results as in `reference.attend`.

    Raises:
      ValueError: heads wider than 128.
    """
    q, k, v, q_sel, k_sel = projections
    for name, array in (("q, k", q), ("v", v), ("q_sel, k_sel", q if q_sel is None else q_sel)):
        if array.shape[-1] > LANES:
            raise ValueError(f"the TPU kernel takes heads of up to 128; {name} have width {array.shape[-1]}")
    reach_B = reach(projections, seen, rule, by_bound=True)
    evict, drops = seen.evict_at is not None, reach_B is not None
    plan = make_plan(q, k, v, q if q_sel is None else q_sel, evict=evict, drops=drops, rule=rule)
    integers = {"offset": jnp.asarray(seen.offset, jnp.int32).reshape(1)}
    scalars = {"reach": jnp.full(k.shape[:1], jnp.inf) if reach_B is None else LOG2_E * reach_B}
    if seen.q_segment_ids is not None and seen.kv_segment_ids is not None:
        integers |= _segment_rows(plan, seen.q_segment_ids, seen.kv_segment_ids)
    if seen.evict_at is not None:
        integers["evict_at"] = pad(seen.evict_at, plan.block_k, 1)[:, None]
    protected = None
    if rule.selection is not Selection.UNPROTECTED_BOS:
        first_BM = jnp.broadcast_to(seen.keys(k.shape[1]).first, k.shape[:2])
        protected = pad(first_BM, plan.block_k, 1)[:, None]
    columns = {
        "q": to_columns(q, plan.num_heads, plan.head_dim, plan.block_q),
        "k": to_columns(k, plan.num_kv_heads, plan.head_dim, plan.block_k),
        "v": to_columns(v, plan.num_kv_heads, plan.value_dim, plan.block_k),
    }
    if q_sel is not None and k_sel is not None and rule.selection is not Selection.OFF:
        columns["q_sel"] = to_columns(q_sel[:, :, None], 1, plan.select_dim, plan.block_q)
        columns["k_sel"] = to_columns(k_sel[:, :, None], 1, plan.select_dim, plan.block_k)
    f_start = pad(f_start.astype(jnp.float32), plan.block_k, 1)[:, None]
    if rule.logit_bound is None:
        bounded = _bounded(plan, columns["q"], columns["k"])
    else:
        bounded = jnp.broadcast_to(_bounds(plan, jnp.asarray(rule.logit_bound, jnp.float32)), k.shape[:1])
    if seen.evict_at is not None:
        bounded *= _sees_first(rule.selection, seen, f_start, q.shape[1])
    scalars = scalars | {"bounded": bounded}
    out, forgotten = _attend(plan, integers | scalars, protected, columns, f_start)
    out = from_columns(out, plan.value_dim, (*q.shape[:3], v.shape[3]))
    return out, None if rule.tau is None else forgotten[:, : q.shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: KernelPlan, integers, protected, columns, f_start):
    return _attend_forward(plan, integers, protected, columns, f_start)[0]


def _attend_forward(plan: KernelPlan, integers, protected, columns, f_start):
    operands = _operands(plan, integers, protected, columns)
    if plan.selection is not Selection.OFF:
        operands["f_start"] = f_start
    scalars = (integers["offset"], integers["bounded"], integers["reach"])
    made = jax.tree.map(keep, on_platform(functools.partial(forward, plan), operands, scalars))
    forgotten = made["forgotten"][:, 0, 0] if "forgotten" in made else jnp.zeros(columns["q"].shape[::2], jnp.float32)
    residuals = (integers, protected, columns, made["out"], made["log_sum"], made.get("f_blocks"))
    return (made["out"], forgotten), residuals


def _attend_backward(plan: KernelPlan, residuals, cotangents):
    integers, protected, columns, out, log_sum, f_blocks = residuals
    plan = dataclasses.replace(plan, block_q=plan.backward_block, block_k=plan.backward_block)
    d_out, d_forgotten = cotangents
    # Split into heads before multiplying: so the compiler does it where the matmul makes d_out.
    out_BHDN, d_out_BHDN = (x.reshape(x.shape[0], -1, plan.value_dim, x.shape[2]) for x in (out, d_out))
    delta_BHN = jnp.sum(out_BHDN.astype(jnp.float32) * d_out_BHDN.astype(jnp.float32), axis=2)
    operands = _operands(plan, integers, protected, columns) | {
        "d_out": d_out,
        "log_sum": log_sum,
        "delta": delta_BHN.reshape(log_sum.shape),
    }
    if plan.selection is not Selection.OFF:
        operands["f_blocks"] = f_blocks
        if plan.tau is not None:
            operands["d_forgotten"] = d_forgotten[:, None]
    made = _backward_in_chunks(plan, operands, integers["offset"], integers["reach"], columns["k"].dtype)
    d_columns = {name: made[f"d{name}"].astype(columns[name].dtype) for name in ("q", "k", "v")}
    if plan.selection is Selection.OFF:
        return None, None, d_columns, jnp.zeros_like(log_sum, shape=(out.shape[0], 1, columns["k"].shape[2]))
    d_sel = {name: made[f"d{name}"].sum(1) for name in ("q_sel", "k_sel")}
    if protected is not None:
        d_sel["k_sel"] = jnp.where(protected, 0, d_sel["k_sel"])
    for name, of_heads in (("q_sel", "q"), ("k_sel", "k")):
        if name in columns:
            d_columns[name] = d_sel[name].astype(columns[name].dtype)
        else:
            of_head = d_columns[of_heads].at[:, : plan.select_dim]
            d_columns[of_heads] = of_head.set((of_head.get() + d_sel[name]).astype(d_columns[of_heads].dtype))
    return None, None, d_columns, made["df_start"].sum(1)


_attend.defvjp(_attend_forward, _attend_backward)


def _operands(plan: KernelPlan, integers, protected, columns) -> dict[str, Array]:
    """What both kernels read. Head 0 selects, unless the selecting head has its own columns; with a single group its q
    is in every window on q.
    """
    operands = dict(columns)
    if plan.selection is not Selection.OFF:
        if plan.head_groups > 1 and "q_sel" not in columns:
            operands["q_sel"] = columns["q"][:, : plan.select_dim]
        k_sel = columns.get("k_sel", columns["k"][:, : plan.select_dim])
        # A key of zeros is never selected, which is all that protects the first token of a segment.
        operands["k_sel"] = k_sel if protected is None else jnp.where(protected, 0, k_sel)
    return operands | {name: rows for name, rows in integers.items() if name not in ("offset", "bounded", "reach")}


def _backward_in_chunks(
    plan: KernelPlan, operands: dict[str, Array], offset: Array, reach_B: Array, dtype: jnp.dtype
) -> dict[str, Array]:
    """The backward kernel over chunks of queries, the last one first: a chunk's gradient of q has to fit into VMEM."""
    batch, num_keys = operands["k"].shape[0], operands["k"].shape[2]
    num_blocks = operands["q"].shape[2] // plan.block_q
    largest = num_blocks
    if most_queries(plan, operands["q"].dtype, dtype) < num_blocks * plan.block_q:
        largest = max(1, most_queries(plan, operands["q"].dtype, jnp.float32) // plan.block_q)
    chunks = next(n for n in range(1, num_blocks + 1) if num_blocks % n == 0 and num_blocks // n <= largest)
    later = jnp.zeros((batch, plan.head_groups, 1, num_keys), jnp.float32)
    selecting = plan.selection is not Selection.OFF

    def run(offset, later, operands, key_dtype):
        operands = operands | ({"later": later} if selecting else {})
        nq = operands["q"].shape[2] // plan.block_q
        last_BJ = jnp.full((batch, num_keys // plan.block_k), nq - 1)
        ends: tuple[Array, ...] = ()
        if plan.drops:
            last_BJ, ends = _forgotten_from(plan, operands["f_blocks"], reach_B, offset)
        starts_I = offset + plan.block_q * jnp.arange(nq, dtype=jnp.int32)
        scalars = (starts_I, *Steps.living(plan, offset, last_BJ, nq), *ends)
        return on_platform(functools.partial(backward, plan, key_dtype=key_dtype), operands, scalars)

    if chunks == 1:
        return run(offset, later, operands, dtype)
    of_keys = {name: x for name, x in operands.items() if name not in QUERY_AXES}
    of_queries = {name: _split(x, QUERY_AXES[name], chunks) for name, x in operands.items() if name in QUERY_AXES}

    def step(carry, chunk):
        sums, later = carry
        start, of_queries = chunk
        made = run(offset + start, later, of_keys | of_queries, jnp.float32)
        if selecting:
            later = -made["df_start"]
        return ({name: x + made[name] for name, x in sums.items()}, later), {
            n: made[n] for n in made if n in QUERY_AXES
        }

    widths = {"dk": plan.num_kv_heads * plan.head_dim, "dv": plan.num_kv_heads * plan.value_dim}
    shapes: dict[str, tuple[int, ...]] = {name: (batch, width, num_keys) for name, width in widths.items()}
    if selecting:
        shapes["dk_sel"] = (batch, plan.head_groups, plan.select_dim, num_keys)
    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    starts = jnp.arange(chunks, dtype=jnp.int32) * (num_blocks // chunks * plan.block_q)
    (sums, later), of_queries = jax.lax.scan(step, (zeros, later), (starts, of_queries), reverse=True)
    joined = {name: _join(x, QUERY_AXES[name]) for name, x in of_queries.items()}
    return joined | sums | {"df_start": -later}


def _forgotten_from(plan: KernelPlan, f_blocks: Array, reach_B: Array, offset: Array) -> tuple[Array, tuple[Array]]:
    """Int32: the last block of queries that has not forgotten a block of keys for good [B, nk], and the first, if any,
    that has forgotten 128 keys [B * M / 128].
    """
    f_BIJL = f_blocks[:, 0, :: plan.columns, 0].reshape(f_blocks.shape[0], -1, f_blocks.shape[4] // LANES, LANES)
    dead_BIJ = (f_BIJL > reach_B[:, None, None, None]).all(axis=-1)
    num_blocks, parts = dead_BIJ.shape[1:]
    first_query_I1 = offset + plan.block_q * jnp.arange(num_blocks, dtype=jnp.int32)[:, None]
    earlier_IJ = LANES * jnp.arange(1, parts + 1, dtype=jnp.int32) <= first_query_I1  # of the others F is not written
    ends_BJ = num_blocks - jnp.sum(dead_BIJ & earlier_IJ, axis=1, dtype=jnp.int32)
    return ends_BJ.reshape(len(ends_BJ), -1, plan.parts).max(axis=2) - 1, (ends_BJ.reshape(-1),)


def _split(x: Array, axis: int, chunks: int) -> Array:
    """Chunks of `axis` along a new first axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _bounded(plan: KernelPlan, q_BRN: Array, k_BRN: Array) -> Array:
    """Int32 [B]: whether Cauchy-Schwarz bounds all logits of a sequence, so that no running maximum is needed."""

    def largest_norm(x_BRN: Array) -> Array:
        squares = jnp.square(x_BRN.astype(jnp.float32)).reshape(x_BRN.shape[0], -1, plan.head_dim, x_BRN.shape[2])
        return jnp.sqrt(jnp.max(jnp.sum(squares, 2), (1, 2)))

    return _bounds(plan, abs(plan.scale) * jax.lax.stop_gradient(largest_norm(q_BRN) * largest_norm(k_BRN)))


def _bounds(plan: KernelPlan, largest_logit: Array) -> Array:
    """Int32, whether logits of at most this size let a tile do without a running maximum.

    F only lowers logits, and never a query's logit with its own key, so a sum of exp2 can't vanish either. That does
    not hold for a leaky rule (which raises logits); for evicted keys see `_sees_first`.
    """
    if plan.selection is Selection.LEAKY:
        return jnp.zeros(largest_logit.shape, jnp.int32)
    return (largest_logit * LOG2_E <= LOGIT_BOUND).astype(jnp.int32)


def _sees_first(selection: Selection, seen: Seen, f_start_B1M: Array, length: int) -> Array:
    """Int32 [B], whether all queries see the first key, which F does not lower: then no sum vanishes, even where a
    query's own key is gone.
    """
    evict_at_BM = jnp.asarray(seen.evict_at)
    if selection is Selection.UNPROTECTED_BOS or seen.kv_segment_ids is not None:
        return jnp.zeros(evict_at_BM.shape[0], jnp.int32)
    stays_B = evict_at_BM[:, 0] >= seen.offset + length
    return (stays_B & (f_start_B1M[:, 0, 0] == 0)).astype(jnp.int32)


def _segment_rows(plan: KernelPlan, q_segment_ids: Array, kv_segment_ids: Array) -> dict[str, Array]:
    """Segment ids as rows [B, 1, N or M] of which plain equality decides: padding equals nothing."""
    q_segment = pad(jnp.where(q_segment_ids < 0, -2, q_segment_ids), plan.block_q, 1, -2)
    kv_segment = pad(jnp.where(kv_segment_ids < 0, -1, kv_segment_ids), plan.block_k, 1, -1)
    return {"q_segment": shuffle(q_segment, 1)[:, None], "kv_segment": kv_segment[:, None]}
