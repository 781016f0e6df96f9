"""The forward TPU kernel: one pass over blocks of queries (outer) and keys (inner), all heads of a group in the body.

Grid: (batch, head group, query block i, key block j). Batch and head group are independent, and are what the two cores
of a chip share out; i and j run in order. Scratch, all in VMEM, lives across grid steps:

- F's carry [key blocks, 1, Bk]: F of each key at the start of query block i, from all blocks before it. F at every
  128th query is also an output, [B, groups, N / 128, 1, M]: the backward pass runs through the queries in reverse.
- per head the running maximum, the sum and the output of the softmax, over the key blocks j.

All inputs are columns [B, heads * D, N], positions along lanes, as the projections can write them without a copy. What
a matmul needs as rows [T, Bk, 128], heads side by side in T tiles of 128 lanes, is turned here, when it is first used.
"""

import functools
import types
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...selection import Selection
from .tile import (
    HIDDEN,
    LANES,
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
    windowed,
)

KEY_ROWS_BYTES = 4 * 2**20  # of a sequence's keys as rows, that are kept from one block of queries to the next
EMPTY = -1e29  # a running maximum below this has met hidden pairs only
DELAYS = (0, 3, 6)  # units between a unit's stages
MASK_LEADS = (30, 24, 18)  # units from the stages of a square's F to its first use


def forward(plan: Plan, operands: dict[str, Array], scalars: tuple[Array, Array], interpret: bool) -> dict[str, Array]:
    """Runs the kernel; `scalars`: the first position [1] and, per sequence, whether logits are bounded [B]."""
    batch, _, num_queries = operands["q"].shape
    num_keys = operands["k"].shape[2]
    nq, nk = num_queries // plan.block_q, num_keys // plan.block_k

    def key_block(i, j, scalars):
        return jnp.minimum(j, plan.last_block_k(i, scalars[0]))  # nothing is fetched for a tile that is skipped

    c, heads, kv_heads = plan.columns, plan.group_heads, plan.group_kv_heads
    per_query_row = pl.BlockSpec((1, 1, plan.block_q), lambda b, g, i, j, *_: (b, 0, i))
    per_key_row = pl.BlockSpec((1, 1, plan.block_k), lambda b, g, i, j, s, _: (b, 0, key_block(i, j, s)))

    def query_columns(rows):
        return column_windows(plan.block_q, rows, lambda b, g, i, j, *_: (b, g, i))

    def key_columns(rows):
        return column_windows(plan.block_k, rows, lambda b, g, i, j, s, _: (b, g, key_block(i, j, s)))

    specs = {
        "q": query_columns(heads * plan.head_dim),
        "k": key_columns(kv_heads * plan.head_dim),
        "v": key_columns(kv_heads * plan.value_dim),
        "q_sel": column_windows(plan.block_q, plan.select_dim, lambda b, g, i, j, *_: (b, 0, i)),
        "k_sel": column_windows(plan.block_k, plan.select_dim, lambda b, g, i, j, s, _: (b, 0, key_block(i, j, s))),
        "f_start": pl.BlockSpec((1, 1, plan.block_k), lambda b, g, i, j, *_: (b, 0, jnp.where(i == 0, j, nk - 1))),
        "q_segment": per_query_row,
        "kv_segment": per_key_row,
        "evict_at": per_key_row,
    }
    out = {
        "out": (
            pl.BlockSpec((1, heads * plan.value_dim, plan.block_q), lambda b, g, i, j, *_: (b, g, i)),
            jax.ShapeDtypeStruct((batch, plan.num_heads * plan.value_dim, num_queries), operands["q"].dtype),
        ),
        "log_sum": (
            pl.BlockSpec((1, 1, heads, plan.block_q), lambda b, g, i, j, *_: (b, g, 0, i)),
            jax.ShapeDtypeStruct((batch, plan.head_groups, heads, num_queries), jnp.float32),
        ),
    }
    if plan.selection is not Selection.OFF:
        out["f_blocks"] = (
            pl.BlockSpec((1, 1, c, 1, plan.block_k), lambda b, g, i, j, s, _: (b, g, i, 0, key_block(i, j, s))),
            jax.ShapeDtypeStruct((batch, plan.head_groups, num_queries // LANES, 1, num_keys), jnp.float32),
        )
    if plan.tau is not None:
        out["forgotten"] = (
            pl.BlockSpec((1, 1, 1, plan.block_q), lambda b, g, i, j, *_: (b, g, 0, i)),
            jax.ShapeDtypeStruct((batch, plan.head_groups, 1, num_queries), jnp.float32),
        )
    tiles = pl.cdiv(kv_heads * plan.head_dim, LANES)
    row_blocks = nk if nk * tiles * plan.block_k * LANES * operands["k"].dtype.itemsize <= KEY_ROWS_BYTES else 1
    scratch = {
        "k_rows": pltpu.VMEM((row_blocks, tiles, plan.block_k, LANES), operands["k"].dtype),
        "carry": pltpu.VMEM((nk, 1, plan.block_k), jnp.float32),
        "f": pltpu.VMEM((c, plan.block_k, LANES), jnp.float32),
        "maximum": pltpu.VMEM((heads, plan.block_q), jnp.float32),
        "total": pltpu.VMEM((heads, plan.block_q), jnp.float32),
        "sum": pltpu.VMEM((c, heads * plan.value_dim, LANES), jnp.float32),
    }
    if plan.selection is not Selection.OFF:
        scratch["q_sel_rows"] = pltpu.VMEM((plan.block_q, plan.select_dim), operands["q_sel"].dtype)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, nk, tuple(operands) + tuple(out) + tuple(scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, plan.head_groups, nq, nk),
            in_specs=[specs[name] for name in operands],
            out_specs=[spec for spec, _ in out.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for _, shape in out.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=interpret,
        name="selective_attention_forward",
    )(*scalars, *windowed(operands, specs))
    return dict(zip(out, results, strict=True))


def _kernel(plan: Plan, nk: int, names: tuple[str, ...], offset_ref, bounded_ref, *refs) -> None:
    ref = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    offset = offset_ref[0]
    last_j = jnp.minimum(plan.last_block_k(i, offset), nk - 1)
    bounded = bounded_ref[b] != 0

    @pl.when(j == 0)
    def _start_of_query_block():
        # Logits that are known to be small need no running maximum: it stays 0 and nothing is ever rescaled.
        ref.maximum[...] = jnp.full(ref.maximum.shape, jnp.where(bounded, 0.0, -HIDDEN), jnp.float32)
        ref.total[...] = jnp.zeros_like(ref.total)
        ref.sum[...] = jnp.zeros_like(ref.sum)
        if plan.tau is not None:
            ref.forgotten[...] = jnp.zeros_like(ref.forgotten)
        if plan.selection is not Selection.OFF:
            for c in range(plan.columns):
                ref.q_sel_rows[lanes(c)] = shuffle_lanes(ref.q_sel[c][0].astype(jnp.float32)).T.astype(
                    ref.q_sel_rows.dtype
                )

    if plan.selection is not Selection.OFF:

        @pl.when(i == 0)
        def _start_of_sequence():
            ref.carry[j] = ref.f_start[0] * LOG2_E

    kept = ref.k_rows.shape[0] == nk
    ref.k_rows = ref.k_rows.at[j if kept else 0]

    @pl.when((j <= last_j) & ((i == plan.first_block_q(j, offset)) | (not kept)))
    def _first_use_of_keys():
        store_rows(ref.k_rows, ref.k)

    first_query, first_key = offset + i * plan.block_q, j * plan.block_k
    diagonal = (first_query == first_key) & (plan.block_q == plan.block_k)

    @pl.when(bounded & diagonal)
    def _diagonal_tile():
        _bounded_softmax(plan, ref, j, Tile(plan, ref, first_query, first_key, diagonal=True))

    @pl.when(bounded & (j <= last_j) & ~diagonal)
    def _tile():
        _bounded_softmax(plan, ref, j, Tile(plan, ref, first_query, first_key, diagonal=False))

    @pl.when(~bounded & (j <= last_j))
    def _tile_of_unbounded_logits():
        _online_softmax(plan, ref, j, Tile(plan, ref, first_query, first_key, diagonal=False))

    @pl.when(j == last_j)
    def _end_of_query_block():
        total = ref.total[...]
        empty = (total == 0) | (ref.maximum[...] < EMPTY)
        # A query that sees nothing: its output is zero, and so are its weights in the backward pass.
        ref.log_sum[0, 0] = jnp.where(empty, HIDDEN, ref.maximum[...] + jnp.log2(total))
        inverse = jnp.where(empty, 0.0, 1.0 / total)
        for c in range(plan.columns):
            for head in range(plan.group_heads):
                rows = head_rows(head, plan.value_dim)
                scaled = ref.sum[c, rows] * inverse[head : head + 1, lanes(c)]
                ref.out[0, rows, lanes(c)] = scaled.astype(ref.out.dtype)


def _mask_chores(plan: Plan, ref, j, tile: Tile, units_per_square: int, first_use: int) -> list[tuple[int, Callable]]:
    """Makes ref.f, what is subtracted from every head's logits, in time for each square's units and amid earlier ones.

    Returns chores for `software_pipeline`, whose units read ref.f `first_use` steps after they start.
    """
    chores: list[tuple[int, Callable]] = []
    if plan.selection is not Selection.OFF:
        tile.start(ref.carry[j])
    for n, (c, block) in enumerate(tile.squares()):
        made: dict[str, Array] = {"f": jnp.zeros((LANES, LANES), jnp.float32)}

        def select(c=c, block=block, made=made):
            made["s"] = tile.select(c, block)

        def mask(c=c, block=block, made=made):
            ref.f_blocks[0, 0, c, :, lanes(block)] = tile.carry[block]
            made["f"] = tile.mask(block, made.pop("s"))

        def store(c=c, block=block, made=made):
            hidden_f = tile.hide(c, block, made.pop("f"))
            ref.f[c, lanes(block)] = hidden_f
            if plan.tau is not None:
                tau = plan.tau * LOG2_E
                clipped = jnp.where(hidden_f < HIDDEN, jnp.minimum(hidden_f, tau), 0.0)
                ref.forgotten[0, 0, :, lanes(c)] += jnp.sum(clipped, axis=0, keepdims=True) * (1 / tau)

        deadline = n * units_per_square + first_use
        if plan.selection is not Selection.OFF:
            chores += [(deadline - MASK_LEADS[0], select), (deadline - MASK_LEADS[1], mask)]
        chores.append((deadline - MASK_LEADS[2], store))
    if plan.selection is not Selection.OFF:

        def keep_carry():
            ref.carry[j] = jnp.concatenate([tile.carry[block] for block in sorted(tile.carry)], axis=1)

        chores.append((len(tile.squares()) * units_per_square, keep_carry))
    return chores


def _scores(plan: Plan, ref, c: int, head: int, keys: slice) -> Array:
    """Logits in base 2, [keys, 128]."""
    kv_head = plan.kv_head(head)
    q_LL = fill_lanes(ref.q[c][0, head_rows(head, plan.head_dim)], kv_head)
    return dot(ref.k_rows[lane_tile(kv_head, plan.head_dim), keys], q_LL, (1, 0)) * (plan.scale * LOG2_E)


def _weighted_values(plan: Plan, ref, head: int, blocks: Sequence[int], weights: Array) -> tuple[Array, Array]:
    """v^T @ weights [D, 128] and, from the same matmul by rows of ones under v^T, the sum of the weights [1, 128]."""
    rows = head_rows(plan.kv_head(head), plan.value_dim)
    v_DM = jnp.concatenate([ref.v[block][0, rows] for block in blocks], axis=1)
    ones = jnp.ones((16, v_DM.shape[1]), v_DM.dtype)
    result = dot(jnp.concatenate([v_DM, ones], axis=0), weights.astype(v_DM.dtype), (1, 0))
    return result[: plan.value_dim], result[plan.value_dim : plan.value_dim + 1]


def _bounded_softmax(plan: Plan, ref, j, tile: Tile) -> None:
    """All heads of a tile whose logits cannot overflow exp2."""
    units = [(c, block, head) for c, block in tile.squares() for head in range(plan.group_heads)]

    def scores(unit):
        c, block, head = unit
        return _scores(plan, ref, c, head, lanes(block))

    def weights(unit, scores):
        c, block, _ = unit
        return jnp.exp2(scores - ref.f[c, lanes(block)]).astype(ref.v[block].dtype)

    def accumulate(unit, weights):
        c, block, head = unit
        values, total = _weighted_values(plan, ref, head, [block], weights)
        ref.sum[c, head_rows(head, plan.value_dim)] += values
        ref.total[head : head + 1, lanes(c)] += total

    chores = _mask_chores(plan, ref, j, tile, plan.group_heads, DELAYS[1])
    software_pipeline(units, [scores, weights, accumulate], DELAYS, chores)


def _online_softmax(plan: Plan, ref, j, tile: Tile) -> None:
    """All heads of a tile, with a running maximum: any logits, at a higher price."""
    software_pipeline([], [], [0], _mask_chores(plan, ref, j, tile, 0, 0))
    units = [(c, head) for c in range(plan.columns) for head in range(plan.group_heads)]

    def scores(unit):
        c, head = unit
        return _scores(plan, ref, c, head, slice(0, plan.block_k))

    def weights(unit, scores):
        c, head = unit
        at = (slice(head, head + 1), lanes(c))
        masked = scores - ref.f[c]
        old = ref.maximum[at]
        new = jnp.maximum(old, jnp.max(masked, axis=0, keepdims=True))
        ref.maximum[at] = new
        return jnp.exp2(masked - new), jnp.exp2(old - new)

    def accumulate(unit, weights_and_decay):
        c, head = unit
        weights, decay = weights_and_decay
        values, total = _weighted_values(plan, ref, head, range(plan.block_k // LANES), weights)
        at, rows = (slice(head, head + 1), lanes(c)), head_rows(head, plan.value_dim)
        ref.sum[c, rows] = ref.sum[c, rows] * decay + values
        ref.total[at] = ref.total[at] * decay + total

    software_pipeline(units, [scores, weights, accumulate], delays=(0, 1, 2))
