"""The decoding TPU kernel: takes one token a row into the slots of a layer's cache, in place, and attends for it.

A slot is one row of W = K * D lanes, all key/value heads side by side: so it fills registers whatever a head's width
is, and replacing a token writes one tile of slots. One matmul serves all heads: queries stand block-diagonally in
[H, W], each in the lanes of the key/value head that it reads, and of [H, W] sums of values each keeps those lanes. The
MXU loads every key and value once.

Of int8 keys and values no scale is multiplied with W numbers of a slot: those of keys are with logits, those of values
with weights, [H, M] as both are, each head's spread from its key/value head's by a small matmul.

Grid: (windows of tokens, blocks of rows in each, blocks of slots). A chip's two cores share out the windows. Blocks of
slots run in order, with a running maximum, sum and output; those without a token are not fetched.

Shape letters: as in `columns.py`; M slots, P the same with padding to whole tiles, W = K * D, G = H / K query heads of
a key/value head, R rows of the batch in a block, S rows of scales. Indices: i block of rows, u the same within its
window of tokens, j block of slots, r row of a block.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...selection import HIDDEN, Projections, Selection, allowed, rectified
from .columns import LANES, dot, pad, round_up
from .plan import MIB
from .program import on_platform
from .words import BYTE, TILE, dot_cached, store_bytes, tile_slots, with_byte

CACHES, STATE = ("k", "v", "k_sel"), ("position", "f", "scale")  # of slots
BLOCK_BYTES = 1 * MIB  # of keys that a grid step works on, at most
MOST_ROWS = 8  # of the batch that it works on
LEAST_STEPS = 8  # over which the batch is spread, if it is large enough: the first block's fetch is waited for
LEAST_STEPS_INT8 = 4  # this is fetched sooner, and more rows together hide more of the longer work's latencies


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Static shape and rule of a call; everything that the kernel is specialised to."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_slots: int  # M
    tokens: int  # rows of the batch in a window of tokens: a whole tile, or all
    rows: int  # R
    block: int  # slots that a grid step works on
    selection: Selection
    adds: bool  # S to F; otherwise S itself is given back

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def padded_heads(self) -> int:
        return round_up(self.num_heads, 2 * TILE)

    @property
    def steps(self) -> int:
        """Blocks of rows in a window of tokens."""
        return self.tokens // self.rows

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.num_slots, self.block)

    @property
    def selects(self) -> bool:
        return self.selection is not Selection.OFF


def make_plan(q: Array, k: Array, num_slots: int, num_kv_heads: int, selection: Selection, *, adds: bool) -> DecodePlan:
    """Chooses the blocks: few bytes, so that little is waited for at first, but enough rows to hide latencies."""
    (batch, padded_slots, width), (num_heads, head_dim) = k.shape, q.shape[2:]
    slot_bytes = width * k.dtype.itemsize
    block = padded_slots
    if padded_slots * slot_bytes > BLOCK_BYTES:
        blocks = pl.cdiv(padded_slots * slot_bytes, BLOCK_BYTES)
        block = min(round_up(pl.cdiv(padded_slots, blocks), LANES), padded_slots)
    least = LEAST_STEPS_INT8 if k.dtype == jnp.int8 else LEAST_STEPS
    most = min(MOST_ROWS, batch // least, BLOCK_BYTES // (block * slot_bytes))
    tokens = batch if batch % TILE else TILE
    rows = max(n for n in range(1, max(most, 1) + 1) if tokens % n == 0)
    return DecodePlan(num_heads, num_kv_heads, head_dim, num_slots, tokens, rows, block, selection, adds)


def decode(
    new: Projections, slots: dict[str, Array], slot_B: Array, now_B: Array, selection: Selection, *, adds: bool
) -> tuple[Array, dict[str, Array]]:
    """Puts one token a row into its slot, in place, and attends for it.

    Args:
      new: the token's projections, N = 1.
      slots: "k" and "v" [B, P, W], P at least M and a multiple of `tile_slots`; if int8, "scale" bfloat16 [B, S, M], a
        row for each head's keys, then for each head's values, then zeros, S a multiple of 8; "k_sel" [B, P, D'] where
        the selecting head has its own projections; "position" int32 [B, M], of each slot's token, negative for a free
        slot, free slots behind all others; without it slot m holds position m; "f" float32 [B, M], F of this query,
        unless nothing selects.
      slot_B: int32 [B], each token's slot.
      now_B: int32 [B], its position.
      selection: the rule of F.
      adds: whether F of the next query takes the place of f, or what this query has selected.

    Returns:
      out [B, 1, H, D] and the slots afterwards.
    """
    q, k = new.q, slots["k"]
    batch, head_dim = q.shape[0], q.shape[3]
    num_kv_heads = new.k.shape[2]
    num_slots = next((slots[name].shape[-1] for name in STATE if name in slots), k.shape[1])
    plan = make_plan(q, k, num_slots, num_kv_heads, selection, adds=adds)
    # Query heads that read the same key/value head are G rows: a row has one query of each.
    q_BGKD = jnp.swapaxes(q.reshape(batch, num_kv_heads, plan.group, head_dim), 1, 2)
    heads = {"q": q_BGKD, "k_new": new.k, "v_new": new.v}
    tokens = {name: x.reshape(batch, -1, num_kv_heads * head_dim) for name, x in heads.items()}
    if new.q_sel is not None and new.k_sel is not None and "k_sel" in slots:
        tokens |= {"q_sel": new.q_sel, "k_sel_new": new.k_sel}
    operands = {name: pad(x, LANES, 2).reshape(batch, -1) for name, x in tokens.items()}
    operands |= {name: x if x.ndim == 3 else x[:, None] for name, x in slots.items()}
    scalars = [slot_B, now_B]
    if plan.blocks > 1:
        last_B = jnp.minimum(now_B, num_slots - 1) // plan.block
        scalars.append(jnp.max(last_B.reshape(-1, plan.rows), axis=1))
    made = on_platform(functools.partial(_call, plan), operands, tuple(scalars))
    out_BGW = made["out"].reshape(batch, plan.group, -1)
    out_BGKD = out_BGW[..., : num_kv_heads * head_dim].reshape(q_BGKD.shape)
    after = {name: made[name].reshape(x.shape) for name, x in slots.items()}
    return jnp.swapaxes(out_BGKD, 1, 2).reshape(q.shape).astype(q.dtype), after


def _call(
    plan: DecodePlan, operands: dict[str, Array], scalars: tuple[Array, ...], interpret: bool
) -> dict[str, Array]:
    """Runs the kernel, and gives `out` and what it changes of the operands under their own names."""
    batch, _, width = operands["k"].shape
    windows = {name: _window(plan, name, x) for name, x in operands.items()}
    changed = [name for name in operands if name in (*CACHES, *STATE)]
    tokens = [name for name in operands if name not in changed]
    caches = [name for name in operands if name in CACHES]
    # Of keys and values the kernel itself writes the tile that has changed.
    out_windows = [pl.BlockSpec(memory_space=pl.ANY) if name in caches else windows[name] for name in changed]
    scratch = {"arrived": pltpu.SemaphoreType.DMA((len(caches), plan.rows))}
    quantised = ("k_new", "v_new") if "scale" in operands else ()
    # Single rows are read and written in 32 bits alone: a row of a register holds so many a lane.
    for name, of_name in [*((name, name) for name in tokens), ("out", "q")]:
        kind = jnp.int32 if name in quantised else jnp.float32
        scratch[f"{name}_rows"] = pltpu.VMEM((plan.tokens, operands[of_name].shape[1]), kind)
    if quantised:
        scales = round_up(2 * plan.num_kv_heads, LANES)
        scratch["scale_new_rows"] = pltpu.VMEM((plan.tokens, scales), jnp.float32)
    if plan.blocks > 1:
        for name, lanes in (("maximum", LANES), ("total", LANES), ("sum", width)):
            scratch[name] = pltpu.VMEM((plan.rows, plan.padded_heads, lanes), jnp.float32)
    names = (*operands, "out", *(f"{name}_after" for name in changed), *scratch)

    def body(*refs):
        of_scalars, others = refs[: len(scalars)], refs[len(scalars) :]
        _kernel(plan, caches, tokens, of_scalars, types.SimpleNamespace(**dict(zip(names, others, strict=True))))

    made = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch // plan.tokens, plan.steps, plan.blocks),
            in_specs=list(windows.values()),
            out_specs=[windows["q"], *out_windows],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(operands[x].shape, operands[x].dtype) for x in ("q", *changed)],
        input_output_aliases={len(scalars) + list(operands).index(name): 1 + n for n, name in enumerate(changed)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * plan.num_slots * plan.num_heads * plan.head_dim,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands.values()),
            transcendentals=batch * plan.num_slots * plan.num_heads,
        ),
        interpret=interpret,
        name="selective_attention_decode",
    )(*scalars, *operands.values())
    return dict(zip(("out", *changed), made, strict=True))


def _window(plan: DecodePlan, name: str, x: Array) -> pl.BlockSpec:
    """On what a grid step sees of an operand: slots, what is kept of them, or tokens."""

    def block(i, u, j, scalars):
        rows = i * plan.steps + u
        return rows, jnp.minimum(j, scalars[2][rows]) if plan.blocks > 1 else 0

    def of_slots(i, u, j, *scalars):
        return *block(i, u, j, scalars), 0

    def of_state(i, u, j, *scalars):
        rows, slots = block(i, u, j, scalars)
        return rows, 0, slots

    if name in CACHES:
        return pl.BlockSpec((plan.rows, plan.block, x.shape[2]), of_slots)
    if name in STATE:
        return pl.BlockSpec((plan.rows, x.shape[1], min(plan.block, plan.num_slots)), of_state)
    return pl.BlockSpec((plan.tokens, x.shape[1]), lambda i, *_: (i, 0))


def _kernel(plan: DecodePlan, caches: list[str], tokens: list[str], scalars: tuple[Any, ...], ref) -> None:
    u, j = pl.program_id(1), pl.program_id(2)
    i = pl.program_id(0) * plan.steps + u
    slot, now = scalars[:2]
    # A row of the batch in a window of tokens: one, for each row of the block.
    ref.token = [pl.ds(u * plan.rows + r, 1) for r in range(plan.rows)]

    @pl.when((u == 0) & (j == 0))
    def _read_tokens():
        if hasattr(ref, "scale"):
            ref.scale_new_rows[...] = jnp.zeros_like(ref.scale_new_rows)
        for name in tokens:
            rows, token = getattr(ref, f"{name}_rows"), getattr(ref, name)[...].astype(jnp.float32)
            if rows.dtype == jnp.float32:
                rows[...] = token
            else:
                first = 0 if name == "k_new" else plan.num_kv_heads
                store_bytes(token, rows, ref.scale_new_rows, plan.head_dim, range(first, first + plan.num_kv_heads))

    if plan.blocks == 1:
        _attend(plan, caches, slot, now, ref, i, j, True)
    else:
        pl.when(j <= scalars[2][i])(lambda: _attend(plan, caches, slot, now, ref, i, j, j == 0))

    @pl.when((u == plan.steps - 1) & (j == plan.blocks - 1))
    def _write_tokens():
        ref.out[...] = ref.out_rows[...].astype(ref.out.dtype)


def _attend(plan: DecodePlan, caches: list[str], slot, now, ref, i, j, first) -> None:
    """One block of rows and slots, for these rows the `first` or a later one."""
    rows, block, scale = range(plan.rows), min(plan.block, plan.num_slots), plan.head_dim**-0.5
    heads, width = plan.padded_heads, ref.k.shape[2]
    slots = [slot[i * plan.rows + r] - j * plan.block for r in rows]
    nows = [now[i * plan.rows + r] for r in rows]
    for r in rows if not hasattr(ref, "scale") else ():  # what is no number is a scale there
        _clear_free(plan, ref, r, jnp.minimum(nows[r] + 1, plan.num_slots) - j * plan.block, j)
    copies = [copy for r in rows for copy in _write(plan, caches, ref, i, j, r, slots[r])]
    index = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    position, held = [], []
    for r in rows:
        place = index + j * plan.block
        if hasattr(ref, "position"):
            of_slots = jnp.where(index == slots[r], nows[r], ref.position[r])
            ref.position_after[r] = of_slots
        else:
            of_slots = place
        position.append(of_slots)
        held.append((of_slots >= 0) & (of_slots <= nows[r]) & (place < plan.num_slots))

    own = _own_lanes(plan, (heads, width))
    scales = [_scales(plan, ref, r, index == slots[r]) for r in rows] if hasattr(ref, "scale") else []
    logits = [_dot_queries(plan, ref, r, own) * scale for r in rows]
    if scales:
        logits = [logits[r] * scales[r][0] for r in rows]
    f = [jnp.where(index == slots[r], 0.0, ref.f[r]) for r in rows] if plan.selects else []
    masked = [jnp.where(held[r], logits[r] - f[r] if plan.selects else logits[r], -HIDDEN) for r in rows]
    maxima = [jnp.max(x, axis=1, keepdims=True) for x in masked]
    if plan.blocks > 1:
        olds = [jnp.where(first, -HIDDEN, ref.maximum[r, :, :1]) for r in rows]
        maxima = [jnp.maximum(old, new) for old, new in zip(olds, maxima, strict=True)]
    weights = [jnp.exp(x - m) for x, m in zip(masked, maxima, strict=True)]
    totals = [jnp.sum(w, axis=1, keepdims=True) for w in weights]
    for r in rows if plan.selects else ():
        selecting = _dot_q_sel(plan, ref, r) * scale if hasattr(ref, "q_sel") else logits[r][:1]
        may = held[r] & allowed(nows[r], position[r], position[r] == 0, plan.selection)
        s = jnp.where(may, rectified(selecting, plan.selection), 0.0)
        ref.f_after[r] = f[r] + s if plan.adds else s
    if scales:
        weights = [jnp.where(held[r], weights[r] * scales[r][1], 0.0) for r in rows]
    values = [dot_cached(weights[r], ref.v[r], block, 0, ref.q.dtype) for r in rows]
    if plan.blocks > 1:
        for r in rows:
            decay = jnp.exp(olds[r] - maxima[r])
            totals[r] += jnp.where(first, 0.0, ref.total[r, :, :1] * decay)
            values[r] += jnp.where(first, 0.0, ref.sum[r] * decay)
            ref.maximum[r] = jnp.broadcast_to(maxima[r], (heads, LANES))
            ref.total[r] = jnp.broadcast_to(totals[r], (heads, LANES))
            ref.sum[r] = values[r]
    for r in rows:
        mean = values[r] * (1.0 / totals[r])
        own_sums = [jnp.sum(jnp.where(lanes, mean, 0.0), axis=0, keepdims=True) for lanes in own]
        ref.out_rows[ref.token[r]] = jnp.concatenate(own_sums, axis=1)  # whole: Mosaic stores no single tile of a row
    for condition, copy in copies:
        _when(condition, copy.wait)


def _dot_queries(plan: DecodePlan, ref, r: int, own: list[Array]) -> Array:
    """All heads' queries of row r, each in its own lanes, times the keys of a block: [H, M]."""
    heads, width = own[0].shape
    q, row = jnp.zeros((heads, width), jnp.float32), ref.q_rows[ref.token[r]]
    for g, lanes in enumerate(own):
        q = jnp.where(lanes, row[:, g * width : (g + 1) * width], q)
    return dot_cached(q, ref.k[r], min(plan.block, plan.num_slots), 1, ref.q.dtype)


def _dot_q_sel(plan: DecodePlan, ref, r: int) -> Array:
    """The selecting head's own query times its keys: [1, M]."""
    k_sel = ref.k_sel[r, : min(plan.block, plan.num_slots)]
    q_sel = jnp.broadcast_to(ref.q_sel_rows[ref.token[r]], (2 * TILE, ref.q_sel.shape[1])).astype(k_sel.dtype)
    return dot(q_sel, k_sel, (1, 1))[:1]


def _scales(plan: DecodePlan, ref, r: int, here: Array) -> tuple[Array, Array]:
    """Puts the scales of row r's token where its slot is; BYTE times those that each head's logits and weights meet,
    [H, M] each.
    """
    new = ref.scale_new_rows[ref.token[r]]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (ref.scale.shape[1], new.shape[1]), axis) for axis in (0, 1))
    column = jnp.sum(jnp.where(row == lane, new, 0.0), axis=1, keepdims=True)
    after = jnp.where(here, column, ref.scale[r].astype(jnp.float32)).astype(ref.scale.dtype)
    ref.scale_after[r] = after
    heads, kv_heads = plan.padded_heads, plan.num_kv_heads
    head, row = (jax.lax.broadcasted_iota(jnp.int32, (2 * heads, ref.scale.shape[1]), axis) for axis in (0, 1))
    of_values = head >= heads
    head, row = jnp.where(of_values, head - heads, head), jnp.where(of_values, row - kv_heads, row)
    own = functools.reduce(jnp.logical_or, [head - row == g * kv_heads for g in range(plan.group)])
    own &= (row >= 0) & (row < kv_heads)
    spread = dot(jnp.where(own, BYTE, 0.0).astype(after.dtype), after, (1, 0))
    return spread[:heads], spread[heads:]


def _own_lanes(plan: DecodePlan, shape: tuple[int, int]) -> list[Array]:
    """For each g < G the lanes [H, W] of the key/value head that each row g * K + k reads: those of head k."""
    head, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    starts = [(head - g * plan.num_kv_heads) * plan.head_dim for g in range(plan.group)]
    return [(lane >= start) & (lane < start + plan.head_dim) & (start >= 0) for start in starts]


def _write(plan: DecodePlan, caches: list[str], ref, i, j, r: int, slot) -> list[tuple[Any, Any]]:
    """Puts row r's token into its slot of the window, if it has it, and starts to copy that tile back.

    The copies, and under which condition there are any.
    """
    here = plan.blocks == 1 or (slot >= 0) & (slot < plan.block)
    copies = []
    for n, name in enumerate(caches):
        window, after, new = getattr(ref, name), getattr(ref, f"{name}_after"), getattr(ref, f"{name}_new_rows")
        size = tile_slots(window.dtype)
        first = _tile_start(jnp.clip(slot, 0, plan.block - 1), size)
        there = pl.multiple_of(first + j * plan.block, size)
        tile = window.at[r, pl.ds(first, size)]
        copy = pltpu.make_async_copy(tile, after.at[i * plan.rows + r, pl.ds(there, size)], ref.arrived.at[n, r])

        def put(tile=tile, first=first, new=new, copy=copy):
            replaced = with_byte if tile.dtype == jnp.int8 else _with_row
            tile[...] = replaced(tile[...], slot - first, new[ref.token[r]])
            copy.start()

        _when(here, put)
        copies.append((here, copy))
    return copies


def _with_row(tile: Array, place: Array, new: Array) -> Array:
    """A tile with one row replaced."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    return jnp.where(sublane == place, new, tile.astype(jnp.float32)).astype(tile.dtype)


def _clear_free(plan: DecodePlan, ref, r: int, count, j) -> None:
    """Zeroes row r's values from slot `count` of the window on: their weight is 0, and what was there may be NaN."""
    padded = ref.v_after.shape[1]
    full = plan.block if plan.blocks * plan.block > padded else jnp.minimum(plan.num_slots - j * plan.block, plan.block)

    @pl.when(count < full)
    def _():
        first = _tile_start(jnp.maximum(count, 0))
        at = pl.ds(first, TILE)
        old = ref.v[r, at].astype(jnp.float32)
        sublane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
        ref.v[r, at] = jnp.where(sublane < count - first, old, 0.0).astype(ref.v.dtype)

        @pl.loop(jax.lax.div(first, TILE) + 1, plan.block // TILE)
        def _clear(tile):
            at = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
            ref.v[r, at] = jnp.zeros((TILE, ref.v.shape[2]), ref.v.dtype)


def _tile_start(slot: Array, size: int = TILE) -> Array:
    """The first slot of the tile of a slot; by `div`, which rounds as // does not, but is one operation."""
    return pl.multiple_of(jax.lax.div(slot, size) * size, size)


def _when(condition, do) -> None:
    """`do()` now, where the condition is True, or if it holds."""
    if condition is True:
        do()
    else:
        pl.when(condition)(do)
