"""Eviction times as one TPU kernel, for the policies that judge by attention weights: H2O and TOVA.

Who left changes everybody's weights, so queries are taken in one after the other; but not the logits. Of a block of
queries, the kernel first makes exp(logit) of all heads by the MXU and leaves it in VMEM. A query's weights are then
that times exp(-F), 0 where a token is gone, over its sum: one pass over what is in VMEM for the sums of all heads, and
one for the mean of their weights, the scores, F and the next to leave. Logits have no maximum subtracted: `bounded`
says whether they can do without.

Grid: (groups of sequences, 1, query block, 1). Groups are what the two cores of a chip share out. A register holds 128
columns of 8 sequences, or of fewer, with parts of the heads below one another; what is kept of columns is then there
once for each part. Keys are fetched by the kernel itself, so that those of a block arrive while the queries before it
are taken in.

On other platforms the kernel is interpreted, slowly. Shape letters: README.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from selective_attention.implementations.tpu.columns import LANES, dot, lanes, pad, to_columns
from selective_attention.implementations.tpu.plan import tiling_here
from selective_attention.implementations.tpu.program import Program, Result, Window, on_platform
from selective_attention.implementations.tpu.tile import LOG2_E
from selective_attention.selection import HIDDEN, Rule, allowed, rectified

from .eviction_kernel import NEVER
from .policies import EvictionPolicy, Held
from .weights_plan import Plan, find_sizes, make_plan

NOBODY, NONE = 2**30, -2  # positions: beyond all, and no column's
LOGIT_BOUND = 60.0  # of logits in base 2: up to this sums of exp2 neither overflow nor vanish


class Weighed(NamedTuple):
    """What a layer's columns and their scores are, and who judges."""

    policy: EvictionPolicy
    rule: Rule
    position: Array  # int32 [B, M], of each column's token
    f: Array | None  # float32 [B, M] before the first query; None in a model without selection
    score: Array  # float32 [B, M], the same


def bounded(q: Array, k: Array, position: Array, rule: Rule) -> Array:
    """Bool, whether no logit, by Cauchy-Schwarz, is so large that the kernel would have to know the largest."""

    def norms(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))

    of_keys = jnp.max(jnp.where(position[..., None] < 0, 0, norms(k)))
    return abs(rule.scale) * LOG2_E * jnp.max(norms(q)) * of_keys <= LOGIT_BOUND


def fits(q: Array, k: Array) -> bool:
    """Whether the kernel takes heads of this shape and dtype, and so many columns, on the TPU that is traced for."""
    known = q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float32)
    return known and q.shape[3] <= LANES and find_sizes(q, k) is not None


def times(
    weighed: Weighed,
    q: Array,
    k: Array,
    selecting: tuple[Array, Array] | None,
    arriving: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """When each column leaves, and F and the scores afterwards.

    Args:
      weighed: the columns; the last T of them are the queries' own.
      q, k: [B, T, H, D] and [B, M, K, D], of which `bounded` and `fits` are true.
      selecting: q_sel [B, T, D] and k_sel [B, M, D], where the selecting head has its own; otherwise head 0 selects.
      arriving: int32 [B], each row's first new position, its number of new tokens, and its budget.

    Returns:
      The column index of the query from which on each column is hidden, int32 [B, M], NEVER for what stays; and F of
      the next query and the scores, float32 [B, M], of what stays.
    """
    position = weighed.position
    plan = make_plan(weighed.policy, weighed.rule, q, k, own_head=selecting is not None)
    if selecting is not None:
        q, k = (jnp.concatenate([x, own[:, :, None]], axis=2) for x, own in zip((q, k), selecting, strict=True))
    sequences = plan.groups * plan.rows
    q_rows = pad(q, plan.width, 3).reshape(*q.shape[:2], -1)
    operands = {
        "q": pad(pad(pad(q_rows, LANES, 2), plan.block_q, 1), sequences, 0),
        "keys": pad(pad(to_columns(k, k.shape[2], plan.width, plan.span), LANES, 1), sequences, 0),
        "position": plan.to_chunks(position, -1),
        "f_before": plan.to_chunks(jnp.zeros(position.shape, jnp.float32) if weighed.f is None else weighed.f, 0),
        "score_before": plan.to_chunks(weighed.score, 0),
    }
    operands |= dict(zip(("start", "num_tokens", "budget"), map(plan.to_lanes, arriving), strict=True))
    counts = pad(arriving[1], sequences, 0)
    scalars = (counts, counts.reshape(plan.groups, plan.rows).max(1))
    made = on_platform(functools.partial(_run, plan), operands, scalars)
    leaves, f, score = (plan.from_chunks(made[name], position.shape) for name in ("leaves", "f", "score"))
    return leaves, jnp.where(f >= HIDDEN, 0, f), score


def _run(plan: Plan, operands: dict[str, Array], scalars: tuple[Array, Array], interpret: bool) -> dict[str, Array]:
    of_columns = pl.BlockSpec((plan.chunks, plan.height, LANES), lambda g, *_: (g, 0, 0))
    of_rows = pl.BlockSpec((plan.height, LANES), lambda g, *_: (g, 0))
    q_lanes, dtype = operands["q"].shape[2], operands["q"].dtype
    windows: dict[str, Window] = {
        "q": pl.BlockSpec((plan.rows, plan.block_q, q_lanes), lambda g, _, i, *__: (g, i, 0)),
        "keys": pl.BlockSpec(memory_space=pl.ANY),
    }
    windows |= dict.fromkeys(("position", "f_before", "score_before"), of_columns)
    windows |= dict.fromkeys(("start", "num_tokens", "budget"), of_rows)
    shape = operands["position"].shape
    results = {
        name: Result(of_columns, jax.ShapeDtypeStruct(shape, dtype))
        for name, dtype in (("leaves", jnp.int32), ("f", jnp.float32), ("score", jnp.float32))
    }
    chunks_copied, moving = plan.copied // LANES, plan.block_q * plan.parts
    key_rows = operands["keys"].shape[1]
    scratch: dict[str, Any] = {
        "turned": pltpu.VMEM((key_rows // LANES, moving, LANES), jnp.float32),
        "fetched": pltpu.VMEM((plan.buffers, chunks_copied, plan.rows, key_rows, LANES), dtype),
        "arrived": pltpu.SemaphoreType.DMA((plan.buffers, chunks_copied)),
        "exp": pltpu.VMEM((plan.chunks * plan.depth, plan.block_q * plan.height, LANES), jnp.float32),
        "seen": pltpu.VMEM((plan.chunks, plan.height, LANES), jnp.float32),
        "who": pltpu.VMEM((plan.height, LANES), jnp.int32),
    }
    for n, (rows, jobs) in enumerate(plan.jobs()):
        scratch[f"q_rows_{n}"] = pltpu.VMEM((plan.rows, len(jobs) * moving, rows.stop - rows.start), dtype)
    if plan.selecting_head is not None:
        scratch["s"] = pltpu.VMEM((plan.chunks, plan.block_q * plan.height, LANES), jnp.float32)
    program = Program("eviction_by_weights", (plan.groups, 1, plan.blocks_q, 1), windows, results, scratch)
    return program.run(functools.partial(_kernel, plan), scalars, operands, tiling_here().vmem, interpret)


def _kernel(plan: Plan, counts_ref, most_ref, ref) -> None:
    g, i = pl.program_id(0), pl.program_id(2)
    some = i * plan.block_q < most_ref[g]
    counts = [counts_ref[g * plan.rows + row] for row in range(plan.rows)]
    sequences = pl.ds(g * plan.rows, plan.rows)

    def copies(j):
        slot = jax.lax.rem(j, plan.buffers)
        for n in range(plan.copied // LANES):
            columns = pl.ds(pl.multiple_of(j * plan.copied + n * LANES, LANES), LANES)
            keys = ref.keys.at[sequences, :, columns]
            yield pltpu.make_async_copy(keys, ref.fetched.at[slot, n], ref.arrived.at[slot, n])

    def fetch(j):
        for copy in copies(j):
            copy.start()

    def fetch_first(i):
        pl.loop(0, jnp.minimum(plan.seen(i, plan.copied), plan.buffers))(fetch)

    @pl.when(i == 0)
    def _start():
        pl.when(some)(lambda: fetch_first(0))
        ref.leaves[...] = jnp.full(ref.leaves.shape, NEVER, jnp.int32)
        ref.f[...] = ref.f_before[...]
        ref.score[...] = ref.score_before[...]
        for made in (ref.exp, ref.s) if plan.selecting_head is not None else (ref.exp,):
            _clear(made)  # of columns that no query sees yet, too
        first = _loop_spans(plan, 0, functools.partial(_judge, plan, ref, -1), _nobody(plan))
        ref.who[...] = _next(plan, ref, 0, *first)

    @pl.when(some)
    def _block():
        _place_queries(plan, ref)
        total = plan.seen(i, plan.copied)

        @pl.loop(0, total)
        def _(j):
            for copy in copies(j):
                copy.wait()
            _weigh(plan, ref, counts, i * plan.block_q, j)
            pl.when(j + plan.buffers < total)(lambda: fetch(j + plan.buffers))

        more = (i + 1 < plan.blocks_q) & ((i + 1) * plan.block_q < most_ref[g])
        pl.when(more)(lambda: fetch_first(i + 1))
        ref.who[...] = jax.lax.fori_loop(0, plan.block_q, functools.partial(_step, plan, ref, i), ref.who[...])


def _clear(ref) -> None:
    @pl.loop(0, ref.shape[0])
    def _(n):
        ref[n] = jnp.zeros(ref.shape[1:], ref.dtype)


def _place_queries(plan: Plan, ref) -> None:
    """The rows of each job: a query's parts below one another, each in the lanes of the key/value head it meets."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.block_q, LANES), 1)
    for row in range(plan.rows):
        for n, (rows, jobs) in enumerate(plan.jobs()):
            placed, tiles = getattr(ref, f"q_rows_{n}"), (rows.stop - rows.start) // LANES
            for m, job in enumerate(jobs):
                if tiles > 1:
                    ref.turned[:tiles] = jnp.zeros((tiles, *ref.turned.shape[1:]), jnp.float32)
                for part, head in enumerate(job.heads):
                    q = ref.q[row, :, lanes(head * plan.width // LANES)].astype(jnp.float32)
                    first = plan.kv_head(head) * plan.width
                    if plan.width < LANES:
                        half = first % LANES // plan.width
                        q = q if head % 2 == half else pltpu.roll(q, plan.width, 1)
                        q = jnp.where(lane // plan.width == half, q, 0.0)
                    ref.turned.at[(first - rows.start) // LANES][pl.ds(part, plan.block_q, stride=plan.parts)] = q
                moving = slice(m * plan.block_q * plan.parts, (m + 1) * plan.block_q * plan.parts)
                for tile in range(tiles):
                    placed[row, moving, lanes(tile)] = ref.turned[tile].astype(placed.dtype)


def _weigh(plan: Plan, ref, counts: list[Array], first_query, j) -> None:
    """exp(logit) of a block of queries and some keys, and what these select, a query's sequences below one another."""
    shape, slot = (plan.block_q * plan.parts, LANES), jax.lax.rem(j, plan.buffers)
    query, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    query = first_query + query // plan.parts
    at = plan.num_held + query
    for n in range(plan.copied // LANES):
        chunk = j * (plan.copied // LANES) + n
        column = chunk * LANES + lane
        for row in range(plan.rows):
            position = ref.position[chunk, row : row + 1]
            seen = (column <= at) & (position >= 0)
            of_row = pl.ds(row, plan.block_q * plan.parts, stride=plan.rows)
            for number, (rows, jobs) in enumerate(plan.jobs()):
                logits = dot(getattr(ref, f"q_rows_{number}")[row], ref.fetched[slot, n, row, rows], (1, 0))
                for m, job in enumerate(jobs):
                    of_job = logits[m * shape[0] : (m + 1) * shape[0]]
                    if job.depth is None:
                        selects = seen & (query < counts[row])
                        selects &= allowed(at, column, position == 0, plan.rule.selection)
                        s = jnp.where(selects, rectified(of_job * plan.rule.scale, plan.rule.selection), 0.0)
                        ref.s[chunk, of_row] = s
                    else:
                        exp = jnp.where(seen, jnp.exp2(of_job * (plan.rule.scale * LOG2_E)), 0.0)
                        ref.exp[chunk * plan.depth + job.depth, of_row] = exp


def _step(plan: Plan, ref, i, n, who):
    """Lets `who` leave, then the block's query n see, score and select; the next to leave."""
    t = i * plan.block_q + n
    at = plan.num_held + t
    rows = pl.ds(pl.multiple_of(n * plan.height, plan.height), plan.height)
    real = t < ref.num_tokens[...]

    def total(chunk, totals):
        leaves = ref.position[chunk] == who
        ref.leaves[chunk] = jnp.where(leaves, at, ref.leaves[chunk])
        f = jnp.where(leaves, HIDDEN, ref.f[chunk])
        ref.f[chunk] = f
        seen = jnp.exp2(f * -LOG2_E)
        ref.seen[chunk] = seen
        return tuple(x + ref.exp[chunk * plan.depth + depth, rows] * seen for depth, x in enumerate(totals))

    zeros = (jnp.zeros(who.shape, jnp.float32),) * plan.depth
    totals = _loop_spans(plan, i, total, zeros)
    factors = [(1 / plan.num_heads) / jnp.sum(x, axis=1, keepdims=True) for x in totals]
    factors = [jnp.broadcast_to(x, who.shape) for x in factors]

    def score(chunk, best):
        weights = sum(ref.exp[chunk * plan.depth + depth, rows] * x for depth, x in enumerate(factors))
        shift = plan.height // 2
        while shift >= plan.rows:  # so that all parts add the same numbers, in the same order
            weights = weights + pltpu.roll(weights, shift, 0)
            shift //= 2
        before = ref.score[chunk]
        ref.score[chunk] = jnp.where(real, plan.policy.observe(before, weights * ref.seen[chunk]), before)
        if plan.selecting_head is not None:
            ref.f[chunk] += ref.s[chunk, rows]
        return _judge(plan, ref, t, chunk, best)

    return _next(plan, ref, t + 1, *_loop_spans(plan, i, score, _nobody(plan)))


def _judge(plan: Plan, ref, t, chunk, best):
    """The largest priority yet of each sublane and lane and its oldest token, once query t is through."""
    priority_yet, oldest_yet = best
    position, column = ref.position[chunk], chunk * LANES + jax.lax.broadcasted_iota(jnp.int32, best[0].shape, 1)
    now = ref.start[...] + t + 1
    held = Held(position, ref.f[chunk], ref.score[chunk], now, ref.budget[...], 0)
    may = (ref.leaves[chunk] == NEVER) & (position > 0) & (column <= plan.num_held + t)
    priority = jnp.where(may, plan.policy.priority(held), -jnp.inf)
    better = (priority > priority_yet) | ((priority == priority_yet) & (position < oldest_yet))
    return jnp.where(better, priority, priority_yet), jnp.where(better, position, oldest_yet)


def _nobody(plan: Plan) -> tuple[Array, Array]:
    shape = plan.height, LANES
    return jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, NOBODY, jnp.int32)


def _next(plan: Plan, ref, t, priority, oldest):
    """The position of whom query t makes leave, the same in all lanes; NONE where there is room, or no such query."""
    most = jnp.max(priority, axis=1, keepdims=True)
    who = jnp.min(jnp.where(priority == most, oldest, NOBODY).astype(jnp.float32), axis=1, keepdims=True)
    evicts = (t < ref.num_tokens[...]) & (ref.start[...] + t >= ref.budget[...])
    return jnp.where(evicts, jnp.broadcast_to(who, oldest.shape).astype(jnp.int32), NONE)


def _loop_spans(plan: Plan, i, of_chunk, carry):
    """`of_chunk(chunk, carry)` over the columns that queries of block i see, some at a time."""
    chunks = plan.span // LANES

    def of_span(n, carry):
        for m in range(chunks):
            carry = of_chunk(n * chunks + m, carry)
        return carry

    return jax.lax.fori_loop(0, plan.seen(i, plan.span), of_span, carry)
