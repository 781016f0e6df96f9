"""The forward TPU kernel: one pass over blocks of queries (outer) and keys (inner), all heads of a group in the body.

Grid: (batch, head group, query block i, key block j). Batch and head group are independent, and are what the two cores
of a chip share out; i and j run in order. Scratch, all in VMEM, lives across grid steps:

- F's carry [key blocks, 1, Bk]: F of each key at the start of query block i, from all blocks before it. F at every
  128th query is also an output, [B, groups, N / 128, 1, M]: the backward pass runs through the queries in reverse.
- per head the running maximum, the sum and the output of the softmax, over the key blocks j;
- in SMEM, for every 128 keys, whether any of them lives at the start of query block i: below the diagonal nothing is
  computed for those that are forgotten for good. They are fetched, since a step's windows are known before its F.

All inputs are columns [B, R, N], positions along lanes, as the projections can write them without a copy. What
a matmul needs as rows [T, Bk, 128], heads side by side in T tiles of 128 lanes, is turned here, when it is first used.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...selection import HIDDEN, NOTHING_SEEN
from .columns import LANES, dot, fill_lanes, head_rows, lane_tile, lanes, shuffle_lanes, store_rows
from .pipeline import Line, software_pipeline
from .plan import KernelPlan
from .program import Program, Result, input_windows
from .tile import LOG2_E, Square, Tile, selecting_columns

KEY_ROWS_BYTES = 4 * 2**20  # of a sequence's keys as rows, that are kept from one block of queries to the next
DELAYS = (0, 3, 6)  # units between a unit's stages
MASK_LEADS = (30, 24, 18)  # units from the stages of a square's F to its first use


def forward(
    plan: KernelPlan, operands: dict[str, Array], scalars: tuple[Array, ...], interpret: bool
) -> dict[str, Array]:
    """Runs the kernel; `scalars`: the first position [1] and, per sequence, whether logits are bounded [B] and the F in
    base 2 above which keys are forgotten [B].
    """
    batch, _, num_queries = operands["q"].shape
    num_keys, dtype = operands["k"].shape[2], operands["k"].dtype
    nq, nk = num_queries // plan.block_q, num_keys // plan.block_k
    heads, groups = plan.group_heads, plan.head_groups

    def key_block(_, i, j, offset, *scalars):
        return jnp.minimum(j, plan.last_block_k(i, offset[0]))  # nothing is fetched for a tile that is skipped

    def of_queries(rows: int) -> Result:
        window = pl.BlockSpec((1, 1, rows, plan.block_q), lambda b, g, i, j, *_: (b, g, 0, i))
        return Result(window, jax.ShapeDtypeStruct((batch, groups, rows, num_queries), jnp.float32))

    windows = input_windows(plan, lambda b, i, *_: i, key_block)
    windows["f_start"] = pl.BlockSpec((1, 1, plan.block_k), lambda b, g, i, j, *_: (b, 0, jnp.where(i == 0, j, nk - 1)))
    out_window = pl.BlockSpec((1, heads * plan.value_dim, plan.block_q), lambda b, g, i, j, *_: (b, g, i))
    out = jax.ShapeDtypeStruct((batch, plan.num_heads * plan.value_dim, num_queries), operands["q"].dtype)
    results = {"out": Result(out_window, out), "log_sum": of_queries(heads)}
    if plan.selects:
        f_shape = (1, 1, plan.columns, 1, plan.block_k)
        f_window = pl.BlockSpec(f_shape, lambda b, g, i, *grid: (b, g, i, 0, key_block(b, i, *grid)))
        f_blocks = jax.ShapeDtypeStruct((batch, groups, num_queries // LANES, 1, num_keys), jnp.float32)
        results["f_blocks"] = Result(f_window, f_blocks)
    if plan.tau is not None:
        results["forgotten"] = of_queries(1)
    tiles = pl.cdiv(plan.group_kv_heads * plan.head_dim, LANES)
    row_blocks = nk if nk * tiles * plan.block_k * LANES * dtype.itemsize <= KEY_ROWS_BYTES else 1
    scratch = {
        "k_rows": pltpu.VMEM((row_blocks, tiles, plan.block_k, LANES), dtype),
        "carry": pltpu.VMEM((nk, 1, plan.block_k), jnp.float32),
        "f": pltpu.VMEM((plan.columns, plan.block_k, LANES), jnp.float32),
        "maximum": pltpu.VMEM((heads, plan.block_q), jnp.float32),
        "total": pltpu.VMEM((heads, plan.block_q), jnp.float32),
        "sum": pltpu.VMEM((plan.columns, heads * plan.value_dim, LANES), jnp.float32),
    }
    if plan.drops:
        scratch["alive"] = pltpu.SMEM((nk * plan.parts,), jnp.int32)
    if plan.selects:
        scratch["q_sel_rows"] = pltpu.VMEM((plan.block_q, plan.select_dim), operands["k_sel"].dtype)
    program = Program("selective_attention_forward", (batch, groups, nq, nk), windows, results, scratch)
    return program.run(functools.partial(_kernel, plan, nk), scalars, operands, plan.vmem, interpret)


def _kernel(plan: KernelPlan, nk: int, offset_ref, bounded_ref, reach_ref, ref) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    offset = offset_ref[0]
    last_j = jnp.minimum(plan.last_block_k(i, offset), nk - 1)
    bounded, reach = bounded_ref[b] != 0, reach_ref[b]

    @pl.when(j == 0)
    def _start_of_query_block():
        # Logits that are known to be small need no running maximum: it stays 0 and nothing is ever rescaled.
        ref.maximum[...] = jnp.full(ref.maximum.shape, jnp.where(bounded, 0.0, -HIDDEN), jnp.float32)
        ref.total[...] = jnp.zeros_like(ref.total)
        ref.sum[...] = jnp.zeros_like(ref.sum)
        if plan.tau is not None:
            ref.forgotten[...] = jnp.zeros_like(ref.forgotten)
        if plan.selects:
            for c in range(plan.columns):
                shuffled = shuffle_lanes(selecting_columns(plan, ref, c).astype(jnp.float32))
                ref.q_sel_rows[lanes(c)] = shuffled.T.astype(ref.q_sel_rows.dtype)

    if plan.selects:

        @pl.when(i == 0)
        def _start_of_sequence():
            ref.carry[j] = f_start = ref.f_start[0] * LOG2_E
            for part in range(plan.parts):
                _note_whether_alive(plan, ref, j, part, f_start[:, lanes(part)], reach)

    alive = [ref.alive[j * plan.parts + part] != 0 for part in range(plan.parts)] if plan.drops else [True]
    any_alive, all_alive = functools.reduce(operator.or_, alive), functools.reduce(operator.and_, alive)
    kept = ref.k_rows.shape[0] == nk
    ref.k_rows = ref.k_rows.at[j if kept else 0]

    @pl.when((j <= last_j) & any_alive & ((i == plan.first_block_q(j, offset)) | (not kept)))
    def _first_use_of_keys():
        store_rows(ref.k_rows, ref.k)

    first_query, first_key = offset + i * plan.block_q, j * plan.block_k
    diagonal = (first_query == first_key) & (plan.block_q == plan.block_k)

    @pl.when(bounded & diagonal)
    def _diagonal_tile():
        _bounded_softmax(plan, ref, j, reach, Tile(plan, ref, first_query, first_key, diagonal=True))

    @pl.when(bounded & (j <= last_j) & ~diagonal & all_alive)
    def _tile():
        _bounded_softmax(plan, ref, j, reach, Tile(plan, ref, first_query, first_key, diagonal=False))

    for part in range(plan.parts) if plan.drops else ():
        of_part = functools.partial(Tile, plan, ref, first_query, first_key, diagonal=False, parts=[part])
        below = (j <= last_j) & ~diagonal & ~all_alive

        @pl.when(bounded & below & alive[part])
        def _part_of_tile(of_part=of_part):
            _bounded_softmax(plan, ref, j, reach, of_part())

        @pl.when(below & ~alive[part] & (bounded | ~any_alive))
        def _forgotten_part(of_part=of_part):
            _skip(plan, ref, j, of_part())

    @pl.when(~bounded & (j <= last_j) & (diagonal | any_alive))
    def _tile_of_unbounded_logits():
        _online_softmax(plan, ref, j, reach, Tile(plan, ref, first_query, first_key, diagonal=False))

    @pl.when(j == last_j)
    def _end_of_query_block():
        total = ref.total[...]
        empty = (total == 0) | (ref.maximum[...] < NOTHING_SEEN)
        # A query that sees nothing: its output is zero, and so are its weights in the backward pass.
        ref.log_sum[0, 0] = jnp.where(empty, HIDDEN, ref.maximum[...] + jnp.log2(total))
        inverse = jnp.where(empty, 0.0, 1.0 / total)
        for c in range(plan.columns):
            for head in range(plan.group_heads):
                rows = head_rows(head, plan.value_dim)
                scaled = ref.sum[c, rows] * inverse[head : head + 1, lanes(c)]
                ref.out[0, rows, lanes(c)] = scaled.astype(ref.out.dtype)


def _note_whether_alive(plan: KernelPlan, ref, j, part: int, f: Array, reach: Array) -> None:
    """Of 128 keys and F at the next query, [1, 128]. What is no number lives, and is seen."""
    if plan.drops:
        ref.alive[j * plan.parts + part] = jnp.max(jnp.where(f > reach, 0, 1))


def _skip(plan: KernelPlan, ref, j, tile: Tile) -> None:
    """Does what is left to do for keys that are forgotten: tells the backward pass, and counts them."""
    for part in tile.parts:
        for c in range(plan.columns):
            ref.f_blocks[0, 0, c, :, lanes(part)] = ref.carry[j, :, lanes(part)]
            if plan.tau is not None:
                hidden = tile.hide(Square(c, part), jnp.zeros((LANES, LANES), jnp.float32))
                count = jnp.sum(jnp.where(hidden < HIDDEN, 1.0, 0.0), axis=0, keepdims=True)
                ref.forgotten[0, 0, :, lanes(c)] += count


def _mask_chores(plan: KernelPlan, ref, j, reach, tile: Tile, needed: dict[Square, int]) -> list[Line]:
    """Makes ref.f, what is subtracted from every head's logits: for each square by the step when it is `needed`."""

    def mask(square, s):
        ref.f_blocks[0, 0, square.queries, :, lanes(square.keys)] = tile.carry[square.keys]
        return tile.mask(square, s)

    def store(square, f):
        ref.f[square.at] = hidden_f = tile.hide(square, f)
        if plan.tau is not None:
            tau = plan.tau * LOG2_E
            clipped = jnp.where(hidden_f < HIDDEN, jnp.minimum(hidden_f, tau), 0.0)
            ref.forgotten[0, 0, :, lanes(square.queries)] += jnp.sum(clipped, axis=0, keepdims=True) * (1 / tau)

    def keep_carry(part):
        ref.carry[j, :, lanes(part)] = tile.carry[part]
        _note_whether_alive(plan, ref, j, part, tile.carry[part], reach)

    chores = tile.mask_chores(needed, MASK_LEADS, tile.select, mask, store)
    if plan.selects:
        tile.start(ref.carry[j])
        last = {square.keys: step - MASK_LEADS[1] + 1 for square, step in needed.items()}
        chores += [Line(part, [keep_carry], [step]) for part, step in last.items()]
    return chores


def _scores(plan: KernelPlan, ref, queries: int, head: int, keys: slice) -> Array:
    """Logits in base 2, [keys, L]."""
    kv_head = plan.kv_head(head)
    q_LL = fill_lanes(ref.q[queries][0, head_rows(head, plan.head_dim)], kv_head)
    return dot(ref.k_rows[lane_tile(kv_head, plan.head_dim), keys], q_LL, (1, 0)) * (plan.scale * LOG2_E)


def _weighted_values(plan: KernelPlan, ref, head: int, blocks: Sequence[int], weights: Array) -> tuple[Array, Array]:
    """v^T @ weights [D, 128] and, from the same matmul by rows of ones under v^T, the sum of the weights [1, 128]."""
    rows = head_rows(plan.kv_head(head), plan.value_dim)
    v_DM = jnp.concatenate([ref.v[block][0, rows] for block in blocks], axis=1)
    ones = jnp.ones((16, v_DM.shape[1]), v_DM.dtype)
    result = dot(jnp.concatenate([v_DM, ones], axis=0), weights.astype(v_DM.dtype), (1, 0))
    return result[: plan.value_dim], result[plan.value_dim : plan.value_dim + 1]


def _bounded_softmax(plan: KernelPlan, ref, j, reach, tile: Tile) -> None:
    """All heads of a tile whose logits cannot overflow exp2."""
    units = [(square, head) for square in tile.squares() for head in range(plan.group_heads)]

    def scores(unit):
        square, head = unit
        return _scores(plan, ref, square.queries, head, lanes(square.keys))

    def weights(unit, scores):
        square, _ = unit
        return jnp.exp2(scores - ref.f[square.at]).astype(ref.v[square.keys].dtype)

    def accumulate(unit, weights):
        square, head = unit
        values, total = _weighted_values(plan, ref, head, [square.keys], weights)
        ref.sum[square.queries, head_rows(head, plan.value_dim)] += values
        ref.total[head : head + 1, lanes(square.queries)] += total

    needed = {square: n * plan.group_heads + DELAYS[1] for n, square in enumerate(tile.squares())}
    chores = _mask_chores(plan, ref, j, reach, tile, needed)
    software_pipeline(units, [scores, weights, accumulate], DELAYS, chores)


def _online_softmax(plan: KernelPlan, ref, j, reach, tile: Tile) -> None:
    """All heads of a tile, with a running maximum: any logits, at a higher price."""
    software_pipeline([], [], [], _mask_chores(plan, ref, j, reach, tile, dict.fromkeys(tile.squares(), 0)))
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
