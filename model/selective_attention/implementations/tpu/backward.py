"""The backward TPU kernel: one pass over blocks of keys (outer) and of queries in reverse (inner), for all gradients.

Grid: (batch, head group, key block j, reversed query block r). Every tile's logits are recomputed once and give the
gradients of q, k, v and of the selecting head together. What lives in VMEM across grid steps:

- the gradients of q and q_sel for all queries: output blocks that stay until the last block of keys has added its part;
- the gradients of k, v and k_sel of key block j, over the query blocks;
- `later` [1, Bk]: for each key of block j the sum, over all later queries and over heads, of the logits' gradients.
  F enters the logits with a minus sign, so `-later` is the gradient of S (section 3, reversed). It starts from the
  queries after these ones (an input) and ends as the gradient of F before them.

The tile itself, its units and why they are interleaved: `tile.py`.
"""

import functools
import itertools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...selection import Selection
from .tile import (
    LANES,
    LEAKY_SLOPE,
    LOG2_E,
    Plan,
    Tile,
    column_windows,
    dot,
    fill_lanes,
    head_rows,
    lane_tile,
    lanes,
    shuffle_lanes,
    software_pipeline,
    store_rows,
    sum_after,
    unshuffle_lanes,
    windowed,
)

UNIT_HEADS = 2  # of a square, that are one unit of the pipeline: their logits' gradients are summed in registers
DELAYS = (0, 0, 1)  # units between a unit's stages
MASK_LEADS = (8, 5, 4)  # units from the stages of a square's F to its first use
SELECTION_LAGS = (1, 3)  # units from a square's last heads to the later stages of the selecting head's gradient


def backward(
    plan: Plan, operands: dict[str, Array], offset: Array, *, key_dtype: jnp.dtype, interpret: bool
) -> dict[str, Array]:
    """Runs the kernel. Gradients come back in the layout of what they belong to: dk, dv in `key_dtype`, dq in q's
    dtype, those of the selecting head and of F in float32.
    """
    batch, _, num_queries = operands["q"].shape
    num_keys = operands["k"].shape[2]
    nq, nk = num_queries // plan.block_q, num_keys // plan.block_k
    c = plan.columns
    heads, kv_heads = plan.group_heads, plan.group_kv_heads

    def query_block(j, r, offset):
        # Nothing is fetched for a tile that is skipped.
        return jnp.maximum(nq - 1 - r, jnp.minimum(plan.first_block_q(j, offset[0]), nq - 1))

    def query_columns(rows):
        return column_windows(plan.block_q, rows, lambda b, g, j, r, s: (b, g, query_block(j, r, s)))

    def key_columns(rows):
        return column_windows(plan.block_k, rows, lambda b, g, j, r, _: (b, g, j))

    def last_block_q(j, r):
        return jnp.where(j == nk - 1, nq - 1 - r, nq - 1)  # written in the last pass, when all keys have added theirs

    per_head_row = pl.BlockSpec((1, 1, heads, plan.block_q), lambda b, g, j, r, s: (b, g, 0, query_block(j, r, s)))
    per_query_row = pl.BlockSpec((1, 1, plan.block_q), lambda b, g, j, r, s: (b, 0, query_block(j, r, s)))
    per_key_row = pl.BlockSpec((1, 1, plan.block_k), lambda b, g, j, r, _: (b, 0, j))
    specs = {
        "q": query_columns(heads * plan.head_dim),
        "k": key_columns(kv_heads * plan.head_dim),
        "v": key_columns(kv_heads * plan.value_dim),
        "d_out": query_columns(heads * plan.value_dim),
        "log_sum": per_head_row,
        "delta": per_head_row,
        "q_sel": column_windows(plan.block_q, plan.select_dim, lambda b, g, j, r, s: (b, 0, query_block(j, r, s))),
        "k_sel": column_windows(plan.block_k, plan.select_dim, lambda b, g, j, r, _: (b, 0, j)),
        "f_blocks": pl.BlockSpec((1, 1, c, 1, plan.block_k), lambda b, g, j, r, s: (b, g, query_block(j, r, s), 0, j)),
        "later": pl.BlockSpec((1, 1, 1, plan.block_k), lambda b, g, j, r, _: (b, g, 0, j)),
        "d_forgotten": per_query_row,
        "q_segment": per_query_row,
        "kv_segment": per_key_row,
        "evict_at": per_key_row,
    }
    shapes: dict[str, tuple[tuple[int, ...], jnp.dtype]] = {
        "dq": ((plan.num_heads * plan.head_dim, num_queries), operands["q"].dtype),
        "dk": ((plan.num_kv_heads * plan.head_dim, num_keys), key_dtype),
        "dv": ((plan.num_kv_heads * plan.value_dim, num_keys), key_dtype),
    }
    out_specs = {
        "dq": pl.BlockSpec((1, heads * plan.head_dim, plan.block_q), lambda b, g, j, r, _: (b, g, last_block_q(j, r))),
        "dk": pl.BlockSpec((1, kv_heads * plan.head_dim, plan.block_k), lambda b, g, j, r, _: (b, g, j)),
        "dv": pl.BlockSpec((1, kv_heads * plan.value_dim, plan.block_k), lambda b, g, j, r, _: (b, g, j)),
    }
    scratch = {
        "f": pltpu.VMEM((c, plan.block_k, LANES), jnp.float32),
        "k_rows": pltpu.VMEM((pl.cdiv(kv_heads * plan.head_dim, LANES), plan.block_k, LANES), operands["k"].dtype),
        "v_rows": pltpu.VMEM((pl.cdiv(kv_heads * plan.value_dim, LANES), plan.block_k, LANES), operands["v"].dtype),
        "dq_sum": pltpu.VMEM((nq, heads * plan.head_dim, plan.block_q), jnp.float32),
        "dk_sum": pltpu.VMEM((kv_heads * plan.head_dim, plan.block_k), jnp.float32),
        "dv_sum": pltpu.VMEM((kv_heads * plan.value_dim, plan.block_k), jnp.float32),
        "d_logits": pltpu.VMEM((DELAYS[2] + 1, UNIT_HEADS, LANES, LANES), operands["q"].dtype),
    }
    if plan.selection is not Selection.OFF:
        groups, width = plan.head_groups, plan.select_dim
        shapes["dq_sel"] = ((groups, width, num_queries), jnp.float32)
        shapes["dk_sel"] = ((groups, width, num_keys), jnp.float32)
        shapes["df_start"] = ((groups, 1, num_keys), jnp.float32)
        out_specs["dq_sel"] = pl.BlockSpec(
            (1, 1, width, plan.block_q), lambda b, g, j, r, _: (b, g, 0, last_block_q(j, r))
        )
        out_specs["dk_sel"] = pl.BlockSpec((1, 1, width, plan.block_k), lambda b, g, j, r, _: (b, g, 0, j))
        out_specs["df_start"] = pl.BlockSpec((1, 1, 1, plan.block_k), lambda b, g, j, r, _: (b, g, 0, j))
        scratch["q_sel_columns"] = pltpu.VMEM((width, plan.block_q), operands["q_sel"].dtype)
        scratch["q_sel_rows"] = pltpu.VMEM((plan.block_q, width), operands["q_sel"].dtype)
        scratch["dq_sel_sum"] = pltpu.VMEM((nq, width, plan.block_q), jnp.float32)
        scratch["s"] = pltpu.VMEM((c, plan.block_k, LANES), jnp.float32)
        scratch["d_logits_sum"] = pltpu.VMEM((c, plan.block_k, LANES), jnp.float32)
        scratch["later_sum"] = pltpu.VMEM((1, plan.block_k), jnp.float32)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, nq, nk, tuple(operands) + tuple(shapes) + tuple(scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.head_groups, nk, nq),
            in_specs=[specs[name] for name in operands],
            out_specs=[out_specs[name] for name in shapes],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in shapes.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=interpret,
        name="selective_attention_backward",
    )(offset, *windowed(operands, specs))
    return dict(zip(shapes, results, strict=True))


def _kernel(plan: Plan, nq: int, nk: int, names: tuple[str, ...], offset_ref, *refs) -> None:
    ref = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    j, r = pl.program_id(2), pl.program_id(3)
    i = nq - 1 - r
    offset = offset_ref[0]
    selecting = plan.selection is not Selection.OFF

    @pl.when(r == 0)
    def _start_of_key_block():
        ref.dk_sum[...] = jnp.zeros_like(ref.dk_sum)
        ref.dv_sum[...] = jnp.zeros_like(ref.dv_sum)
        store_rows(ref.k_rows, ref.k)
        store_rows(ref.v_rows, ref.v)
        if selecting:
            ref.dk_sel[...] = jnp.zeros_like(ref.dk_sel)
            ref.later_sum[...] = ref.later[0, 0]

    @pl.when(j == 0)
    def _first_part_of_query_block():
        ref.dq_sum[i] = jnp.zeros(ref.dq_sum.shape[1:], jnp.float32)
        if selecting:
            ref.dq_sel_sum[i] = jnp.zeros(ref.dq_sel_sum.shape[1:], jnp.float32)

    first_query, first_key = offset + i * plan.block_q, j * plan.block_k
    diagonal = (first_query == first_key) & (plan.block_q == plan.block_k)

    @pl.when(diagonal)
    def _diagonal_tile():
        _tile_gradients(plan, ref, i, Tile(plan, ref, first_query, first_key, diagonal=True))

    @pl.when((i >= plan.first_block_q(j, offset)) & ~diagonal)
    def _tile():
        _tile_gradients(plan, ref, i, Tile(plan, ref, first_query, first_key, diagonal=False))

    @pl.when(r == nq - 1)
    def _end_of_key_block():
        ref.dk[0] = (ref.dk_sum[...] * plan.scale).astype(ref.dk.dtype)
        ref.dv[0] = ref.dv_sum[...].astype(ref.dv.dtype)
        if selecting:
            ref.dk_sel[...] *= plan.scale
            ref.df_start[0, 0] = -ref.later_sum[...]

    @pl.when(j == nk - 1)
    def _end_of_query_block():
        ref.dq[0] = (ref.dq_sum[i] * plan.scale).astype(ref.dq.dtype)
        if selecting:
            for c in range(plan.columns):
                ref.dq_sel[0, 0, :, lanes(c)] = unshuffle_lanes(ref.dq_sel_sum[i, :, lanes(c)]) * plan.scale


def _mask_chores(
    plan: Plan, ref, tile: Tile, square_starts: dict[tuple[int, int], int], first_use: int
) -> list[tuple[int, Callable]]:
    """Makes ref.f as the forward kernel does, and ref.s, S itself; chores for `software_pipeline`."""
    chores: list[tuple[int, Callable]] = []
    for c, block in square_starts:
        made: dict[str, Array] = {"f": jnp.zeros((LANES, LANES), jnp.float32)}

        def select(c=c, block=block, made=made):
            ref.s[c, lanes(block)] = made["s"] = tile.select(c, block)

        def mask(c=c, block=block, made=made):
            tile.carry[block] = ref.f_blocks[0, 0, c, :, lanes(block)]
            made["f"] = tile.mask(block, made.pop("s"))

        def store(c=c, block=block, made=made):
            ref.f[c, lanes(block)] = tile.hide(c, block, made.pop("f"))

        deadline = square_starts[c, block] + first_use
        if plan.selection is not Selection.OFF:
            chores += [(deadline - MASK_LEADS[0], select), (deadline - MASK_LEADS[1], mask)]
        chores.append((deadline - MASK_LEADS[2], store))
    return chores


def _selection_chores(
    plan: Plan, ref, i, tile: Tile, square_starts: dict[tuple[int, int], int], last_use: int
) -> list[tuple[int, Callable]]:
    """Gradients of the selecting head, from the sum over heads of the logits' gradients; for `software_pipeline`."""
    later = {block: ref.later_sum[:, lanes(block)] for block in range(plan.block_k // LANES)}
    chores: list[tuple[int, Callable]] = []
    for c, block in square_starts:
        made: dict[str, Array] = {}

        def turn(c=c, block=block, made=made):
            d_logits = ref.d_logits_sum[c, lanes(block)]
            if plan.tau is not None:
                # The memory statistic reads F too, where it is below tau; a hidden pair's F is not.
                row = ref.d_forgotten[0, :, lanes(c)] * (1 / plan.tau)
                d_logits -= jnp.where(ref.f[c, lanes(block)] < plan.tau * LOG2_E, row, 0.0)
            made["d_logits"] = tile.turn(d_logits)

        def sum_over_queries(c=c, block=block, made=made):
            d_logits = made.pop("d_logits")
            after, total = sum_after(d_logits)
            d_s = -(later[block] + after)
            later[block] += total
            # S is positive where it passes a gradient, and 0 where nothing may be selected.
            s = ref.s[c, lanes(block)]
            negative = jnp.where(s < 0, LEAKY_SLOPE * d_s, 0.0) if plan.selection is Selection.LEAKY else 0.0
            made["d_selecting"] = jnp.where(s > 0, d_s, negative).astype(ref.q_sel_rows.dtype)

        def multiply(c=c, block=block, made=made):
            d_selecting = made.pop("d_selecting")
            ref.dq_sel_sum[i, :, lanes(c)] += dot(ref.k_sel[block][0], d_selecting, (1, 1))
            ref.dk_sel[0, 0, :, lanes(block)] += dot(ref.q_sel_columns[:, lanes(c)], d_selecting, (1, 0))

        done = square_starts[c, block] + last_use
        chores += [(done, turn), (done + SELECTION_LAGS[0], sum_over_queries), (done + SELECTION_LAGS[1], multiply)]

    def keep_later():
        ref.later_sum[...] = jnp.concatenate([later[block] for block in sorted(later)], axis=1)

    return [*chores, (chores[-1][0] + 1, keep_later)]


def _tile_gradients(plan: Plan, ref, i, tile: Tile) -> None:
    """Gradients of q, k, v and of the selecting head from one tile."""
    squares = sorted(tile.squares(), key=lambda square: -square[0])
    groups = [range(plan.group_heads)[n : n + UNIT_HEADS] for n in range(0, plan.group_heads, UNIT_HEADS)]
    square_starts = {square: n * len(groups) for n, square in enumerate(squares)}
    units = [
        (n % (DELAYS[2] + 1), c, block, heads)
        for n, ((c, block), heads) in enumerate(itertools.product(squares, groups))
    ]

    def scores(unit):
        _, c, block, heads = unit
        made = []
        for head in heads:
            kv_head = plan.kv_head(head)
            q_LL = fill_lanes(ref.q[c][0, head_rows(head, plan.head_dim)], kv_head)
            d_out_LL = fill_lanes(ref.d_out[c][0, head_rows(head, plan.value_dim)], kv_head)
            logits = dot(ref.k_rows[lane_tile(kv_head, plan.head_dim), lanes(block)], q_LL, (1, 0))
            d_weights = dot(ref.v_rows[lane_tile(kv_head, plan.value_dim), lanes(block)], d_out_LL, (1, 0))
            made.append((logits, d_weights))
        return made

    def softmax(unit, scores):
        slot, c, block, heads = unit
        made, total = [], jnp.zeros((LANES, LANES), jnp.float32)
        for n, (head, (logits, d_weights)) in enumerate(zip(heads, scores, strict=True)):
            at = (0, 0, slice(head, head + 1), lanes(c))
            weights = jnp.exp2(logits * (plan.scale * LOG2_E) - ref.f[c, lanes(block)] - ref.log_sum[at])
            d_logits = weights * (d_weights - ref.delta[at])
            total += d_logits
            ref.d_logits[slot, n] = d_logits.astype(ref.dq.dtype)
            made.append(weights.astype(ref.dq.dtype))
        if plan.selection is not Selection.OFF:
            ref.d_logits_sum[c, lanes(block)] = total if 0 in heads else ref.d_logits_sum[c, lanes(block)] + total
        return made

    def accumulate(unit, weights):
        slot, c, block, heads = unit
        for n, (head, weights_LL) in enumerate(zip(heads, weights, strict=True)):
            kv_head = plan.kv_head(head)
            rows, kv_rows = (head_rows(h, plan.head_dim) for h in (head, kv_head))
            value_rows, kv_value_rows = (head_rows(h, plan.value_dim) for h in (head, kv_head))
            ref.dv_sum[kv_value_rows, lanes(block)] += dot(ref.d_out[c][0, value_rows], weights_LL, (1, 1))
            ref.dk_sum[kv_rows, lanes(block)] += dot(ref.q[c][0, rows], ref.d_logits[slot, n], (1, 1))
            ref.dq_sum[i, rows, lanes(c)] += dot(ref.k[block][0, kv_rows], ref.d_logits[slot, n], (1, 0))

    if plan.selection is not Selection.OFF:
        for c in range(plan.columns):
            shuffled = shuffle_lanes(ref.q_sel[c][0].astype(jnp.float32))
            ref.q_sel_columns[:, lanes(c)] = shuffled.astype(ref.q_sel_columns.dtype)
            ref.q_sel_rows[lanes(c)] = shuffled.T.astype(ref.q_sel_rows.dtype)
    chores = _mask_chores(plan, ref, tile, square_starts, DELAYS[1])
    if plan.selection is not Selection.OFF:
        chores += _selection_chores(plan, ref, i, tile, square_starts, len(groups) + DELAYS[1])
    software_pipeline(units, [scores, softmax, accumulate], DELAYS, chores)
