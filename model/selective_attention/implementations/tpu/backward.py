"""The backward TPU kernel: one pass over blocks of keys (outer) and of queries in reverse (inner), for all gradients.

Grid: (batch, head group, step); `steps.py` says which key block j and query block i a step is about. Every tile's
logits are recomputed once and give the gradients of q, k, v and of the selecting head together. What lives in VMEM
across grid steps:

- the gradients of q and q_sel for all queries, until the last block of keys that they see has added its part;
- the gradients of k, v and k_sel of key block j, over the query blocks;
- `later` [1, Bk]: for each key of block j the sum, over all later queries and over heads, of the logits' gradients.
  F enters the logits with a minus sign, so `-later` is the gradient of S (section 3, reversed). It starts from the
  queries after these ones (an input) and ends as the gradient of F before them.

The tile itself: `tile.py`; its units, and why they are interleaved: `pipeline.py`.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...selection import LEAKY_SLOPE, Selection
from .columns import LANES, dot, fill_lanes, head_rows, lane_tile, lanes, shuffle_lanes, store_rows, unshuffle_lanes
from .pipeline import Line, software_pipeline
from .plan import KernelPlan
from .program import Program, Result, input_windows
from .tile import LOG2_E, Square, Tile, selecting_columns, sum_after

UNIT_HEADS = 2  # of a square, that are one unit of the pipeline: their logits' gradients are summed in registers
DELAYS = (0, 0, 1)  # units between a unit's stages
MASK_LEADS = (8, 5, 4)  # units from the stages of a square's F to its first use
SELECTION_LAGS = (0, 1, 3)  # units from a square's last heads to the stages of the selecting head's gradient


def backward(
    plan: KernelPlan, operands: dict[str, Array], scalars: tuple[Array, ...], *, key_dtype: jnp.dtype, interpret: bool
) -> dict[str, Array]:
    """Runs the kernel; `scalars`: the first position of every block of queries [nq], `Steps` and, if the plan drops
    keys, the first block of queries that has forgotten 128 keys [B * M / 128]. Gradients come back in the layout of
    what they belong to: dk, dv in `key_dtype`, dq in q's dtype, those of the selecting head and of F in float32.
    """
    batch, groups, heads = operands["q"].shape[0], plan.head_groups, plan.group_heads
    nq, nk = operands["q"].shape[2] // plan.block_q, operands["k"].shape[2] // plan.block_k
    starts, most, *others = scalars
    length = others[1].shape[0] // batch

    def key_block(b, step, starts, tiles, keys, *_):
        return keys[b * length + step]

    def query_block(b, step, starts, tiles, keys, queries, *_):
        return queries[b * length + step]

    def complete(b, step, starts, tiles, keys, queries, complete, *_):
        return complete[b * length + step]

    def of_heads(rows: int, dtype: jnp.dtype, block: int, blocks: int, index) -> Result:
        window = pl.BlockSpec((1, rows, block), lambda b, g, *grid: (b, g, index(b, *grid)))
        return Result(window, jax.ShapeDtypeStruct((batch, groups * rows, blocks * block), dtype))

    def of_groups(rows: int, block: int, blocks: int, index) -> Result:
        window = pl.BlockSpec((1, 1, rows, block), lambda b, g, *grid: (b, g, 0, index(b, *grid)))
        return Result(window, jax.ShapeDtypeStruct((batch, groups, rows, blocks * block), jnp.float32))

    queries, keys = (plan.block_q, nq, complete), (plan.block_k, nk, key_block)
    windows = input_windows(plan, query_block, key_block)
    row, f_shape = (1, 1, heads, plan.block_q), (1, 1, plan.columns, 1, plan.block_k)
    windows["log_sum"] = windows["delta"] = pl.BlockSpec(row, lambda b, g, *grid: (b, g, 0, query_block(b, *grid)))
    windows["f_blocks"] = pl.BlockSpec(
        f_shape, lambda b, g, *grid: (b, g, query_block(b, *grid), 0, key_block(b, *grid))
    )
    windows["later"] = pl.BlockSpec((1, 1, 1, plan.block_k), lambda b, g, *grid: (b, g, 0, key_block(b, *grid)))
    results = {
        "dq": of_heads(heads * plan.head_dim, operands["q"].dtype, *queries),
        "dk": of_heads(plan.group_kv_heads * plan.head_dim, key_dtype, *keys),
        "dv": of_heads(plan.group_kv_heads * plan.value_dim, key_dtype, *keys),
    }
    if plan.selects:
        results["dq_sel"] = of_groups(plan.select_dim, *queries)
        results["dk_sel"] = of_groups(plan.select_dim, *keys)
        results["df_start"] = of_groups(1, *keys)
    scratch = _scratch(plan, operands, nq)
    program = Program("selective_attention_backward", (batch, groups, most), windows, results, scratch)
    return program.run(functools.partial(_kernel, plan, nq, nk), (starts, *others), operands, plan.vmem, interpret)


def _scratch(plan: KernelPlan, operands: dict[str, Array], nq: int) -> dict[str, pl.MemoryRef]:
    key_rows, value_rows = (plan.group_kv_heads * width for width in (plan.head_dim, plan.value_dim))
    tile = pltpu.VMEM((plan.columns, plan.block_k, LANES), jnp.float32)
    scratch = {
        "f": tile,
        "k_rows": pltpu.VMEM((pl.cdiv(key_rows, LANES), plan.block_k, LANES), operands["k"].dtype),
        "v_rows": pltpu.VMEM((pl.cdiv(value_rows, LANES), plan.block_k, LANES), operands["v"].dtype),
        "dq_sum": pltpu.VMEM((nq, plan.group_heads * plan.head_dim, plan.block_q), jnp.float32),
        "dk_sum": pltpu.VMEM((key_rows, plan.block_k), jnp.float32),
        "dv_sum": pltpu.VMEM((value_rows, plan.block_k), jnp.float32),
        "d_logits": pltpu.VMEM((DELAYS[2] + 1, UNIT_HEADS, LANES, LANES), operands["q"].dtype),
    }
    if plan.selects:
        scratch["q_sel_columns"] = pltpu.VMEM(
            (plan.select_dim, plan.block_q), operands.get("q_sel", operands["q"]).dtype
        )
        scratch["q_sel_rows"] = pltpu.VMEM((plan.block_q, plan.select_dim), operands.get("q_sel", operands["q"]).dtype)
        scratch["dq_sel_sum"] = pltpu.VMEM((nq, plan.select_dim, plan.block_q), jnp.float32)
        scratch["s"] = scratch["d_logits_sum"] = tile
        scratch["later_sum"] = pltpu.VMEM((1, plan.block_k), jnp.float32)
    return scratch


def _kernel(
    plan: KernelPlan, nq: int, nk: int, starts_ref, tiles_ref, keys_ref, queries_ref, complete_ref, *ends_and_ref
) -> None:
    *_, ends_ref, ref = (None, *ends_and_ref)
    b, step = pl.program_id(0), pl.program_id(2)
    at = b * (nq * (nk + 1)) + step
    j, i = keys_ref[at], queries_ref[at]
    is_tile, completes = step < tiles_ref[b], i == complete_ref[at]

    @pl.when(step == 0)
    def _start_of_sequence():
        def clear(n, _):
            ref.dq_sum[n] = jnp.zeros(ref.dq_sum.shape[1:], jnp.float32)
            if plan.selects:
                ref.dq_sel_sum[n] = jnp.zeros(ref.dq_sel_sum.shape[1:], jnp.float32)

        jax.lax.fori_loop(0, nq, clear, None)

    @pl.when(is_tile & ((step == 0) | (keys_ref[jnp.maximum(at - 1, 0)] != j)))
    def _start_of_key_block():
        ref.dk_sum[...] = jnp.zeros_like(ref.dk_sum)
        ref.dv_sum[...] = jnp.zeros_like(ref.dv_sum)
        store_rows(ref.k_rows, ref.k)
        store_rows(ref.v_rows, ref.v)
        if plan.selects:
            ref.dk_sel[...] = jnp.zeros_like(ref.dk_sel)
            ref.later_sum[...] = ref.later[0, 0]

    first_query, first_key = starts_ref[i], j * plan.block_k
    diagonal = (first_query == first_key) & (plan.block_q == plan.block_k)
    sees = is_tile & (first_key < first_query + plan.block_q)

    @pl.when(sees & diagonal)
    def _diagonal_tile():
        _tile_gradients(plan, ref, i, Tile(plan, ref, first_query, first_key, diagonal=True))

    below, part_at = sees & ~diagonal, (b * nk + j) * plan.parts
    alive = [i < ends_ref[part_at + part] for part in range(plan.parts)] if plan.drops else [True]
    all_alive = functools.reduce(operator.and_, alive)

    @pl.when(below & all_alive)
    def _tile():
        _tile_gradients(plan, ref, i, Tile(plan, ref, first_query, first_key, diagonal=False))

    for part in range(plan.parts) if plan.drops and plan.parts > 1 else ():

        @pl.when(below & alive[part] & ~all_alive)
        def _part_of_tile(part=part):
            _tile_gradients(plan, ref, i, Tile(plan, ref, first_query, first_key, diagonal=False, parts=[part]))

    @pl.when(is_tile & completes)
    def _end_of_key_block():
        ref.dk[0] = (ref.dk_sum[...] * plan.scale).astype(ref.dk.dtype)
        ref.dv[0] = ref.dv_sum[...].astype(ref.dv.dtype)
        if plan.selects:
            ref.dk_sel[...] *= plan.scale
            ref.df_start[0, 0] = -ref.later_sum[...]

    @pl.when(completes)
    def _end_of_query_block():
        ref.dq[0] = (ref.dq_sum[i] * plan.scale).astype(ref.dq.dtype)
        if plan.selects:
            for c in range(plan.columns):
                ref.dq_sel[0, 0, :, lanes(c)] = unshuffle_lanes(ref.dq_sel_sum[i, :, lanes(c)]) * plan.scale


def _mask_chores(ref, tile: Tile, needed: dict[Square, int]) -> list[Line]:
    """Makes ref.f as the forward kernel does, and ref.s, S itself."""

    def select(square):
        ref.s[square.at] = s = tile.select(square)
        return s

    def mask(square, s):
        tile.carry[square.keys] = ref.f_blocks[0, 0, square.queries, :, lanes(square.keys)]
        return tile.mask(square, s)

    def store(square, f):
        ref.f[square.at] = tile.hide(square, f)

    return tile.mask_chores(needed, MASK_LEADS, select, mask, store)


def _selection_chores(plan: KernelPlan, ref, i, tile: Tile, done: dict[Square, int]) -> list[Line]:
    """Gradients of the selecting head, from the sum over heads of the logits' gradients, at a step for each square."""
    later = {part: ref.later_sum[:, lanes(part)] for part in tile.parts}

    def turn(square):
        d_logits = ref.d_logits_sum[square.at]
        if plan.tau is not None:
            # The memory statistic reads F too, where it is below tau; a hidden pair's F is not.
            row = ref.d_forgotten[0, :, lanes(square.queries)] * (1 / plan.tau)
            d_logits -= jnp.where(ref.f[square.at] < plan.tau * LOG2_E, row, 0.0)
        return tile.turn(d_logits)

    def sum_over_queries(square, d_logits):
        after, total = sum_after(d_logits)
        d_s = -(later[square.keys] + after)
        later[square.keys] += total
        # S is positive where it passes a gradient, and 0 where nothing may be selected.
        s = ref.s[square.at]
        negative = jnp.where(s < 0, LEAKY_SLOPE * d_s, 0.0) if plan.selection is Selection.LEAKY else 0.0
        return jnp.where(s > 0, d_s, negative).astype(ref.q_sel_rows.dtype)

    def multiply(square, d_selecting):
        queries, keys = lanes(square.queries), lanes(square.keys)
        ref.dq_sel_sum[i, :, queries] += dot(ref.k_sel[square.keys][0], d_selecting, (1, 1))
        ref.dk_sel[0, 0, :, keys] += dot(ref.q_sel_columns[:, queries], d_selecting, (1, 0))

    def keep_later(_):
        for part, row in later.items():
            ref.later_sum[:, lanes(part)] = row

    stages = (turn, sum_over_queries, multiply)
    chores = [Line(square, stages, [step + lag for lag in SELECTION_LAGS]) for square, step in done.items()]
    return [*chores, Line(None, [keep_later], [chores[-1].steps[-1] + 1])]


def _tile_gradients(plan: KernelPlan, ref, i, tile: Tile) -> None:
    """Gradients of q, k, v and of the selecting head from one tile."""
    squares = sorted(tile.squares(), key=lambda square: -square.queries)
    groups = [range(plan.group_heads)[n : n + UNIT_HEADS] for n in range(0, plan.group_heads, UNIT_HEADS)]
    slots = itertools.cycle(range(DELAYS[2] + 1))  # of ref.d_logits: a unit's is free again after its last stage
    units = [(next(slots), square, heads) for square, heads in itertools.product(squares, groups)]

    def scores(unit):
        _, square, heads = unit
        made = []
        for head in heads:
            kv_head = plan.kv_head(head)
            q_LL = fill_lanes(ref.q[square.queries][0, head_rows(head, plan.head_dim)], kv_head)
            d_out_LL = fill_lanes(ref.d_out[square.queries][0, head_rows(head, plan.value_dim)], kv_head)
            logits = dot(ref.k_rows[lane_tile(kv_head, plan.head_dim), lanes(square.keys)], q_LL, (1, 0))
            d_weights = dot(ref.v_rows[lane_tile(kv_head, plan.value_dim), lanes(square.keys)], d_out_LL, (1, 0))
            made.append((logits, d_weights))
        return made

    def softmax(unit, scores):
        slot, square, heads = unit
        made, total = [], jnp.zeros((LANES, LANES), jnp.float32)
        for n, (head, (logits, d_weights)) in enumerate(zip(heads, scores, strict=True)):
            at = (0, 0, slice(head, head + 1), lanes(square.queries))
            weights = jnp.exp2(logits * (plan.scale * LOG2_E) - ref.f[square.at] - ref.log_sum[at])
            d_logits = weights * (d_weights - ref.delta[at])
            total += d_logits
            ref.d_logits[slot, n] = d_logits.astype(ref.dq.dtype)
            made.append(weights.astype(ref.dq.dtype))
        if plan.selects:
            ref.d_logits_sum[square.at] = total if 0 in heads else ref.d_logits_sum[square.at] + total
        return made

    def accumulate(unit, weights):
        slot, square, heads = unit
        for n, (head, weights_LL) in enumerate(zip(heads, weights, strict=True)):
            kv_head = plan.kv_head(head)
            rows, kv_rows = (head_rows(h, plan.head_dim) for h in (head, kv_head))
            value_rows, kv_value_rows = (head_rows(h, plan.value_dim) for h in (head, kv_head))
            ref.dv_sum[kv_value_rows, lanes(square.keys)] += dot(
                ref.d_out[square.queries][0, value_rows], weights_LL, (1, 1)
            )
            ref.dk_sum[kv_rows, lanes(square.keys)] += dot(
                ref.q[square.queries][0, rows], ref.d_logits[slot, n], (1, 1)
            )
            ref.dq_sum[i, rows, lanes(square.queries)] += dot(
                ref.k[square.keys][0, kv_rows], ref.d_logits[slot, n], (1, 0)
            )

    if plan.selects:
        for c in range(plan.columns):
            shuffled = shuffle_lanes(selecting_columns(plan, ref, c).astype(jnp.float32))
            ref.q_sel_columns[:, lanes(c)] = shuffled.astype(ref.q_sel_columns.dtype)
            ref.q_sel_rows[lanes(c)] = shuffled.T.astype(ref.q_sel_rows.dtype)
    starts = {square: n * len(groups) + DELAYS[1] for n, square in enumerate(squares)}
    chores = _mask_chores(ref, tile, starts)
    if plan.selects:
        chores += _selection_chores(plan, ref, i, tile, {at: start + len(groups) for at, start in starts.items()})
    software_pipeline(units, [scores, softmax, accumulate], DELAYS, chores)
