"""Selective attention on a mesh: batch, heads and sequence sharded, by `jax.shard_map`.

- batch (`data`, `fsdp`): nothing to exchange.
- heads (`tensor`): every shard recomputes F from head 0's q and k, which are replicated; the transpose of the
  replication sums their gradients.
- sequence (`context`): every device holds two chunks of queries, gathers keys and values, and starts F from the sum of
  all earlier chunks' column sums, one vector [B, N] per chunk. The sequence is laid out in zig-zag order
  (`zigzag_positions`), so that causal work is even: device p of P holds the chunks p and 2P - 1 - p of 2P.

Shape letters: the package's; Q queries of one device, in its two chunks.
"""

import dataclasses
import math
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P
from jax.sharding import AbstractMesh, AxisType

from .attention import AttentionOptions, attend_whole, checked, implementation_module, selective_attention
from .selection import Projections, Rule, Seen, Selection
from .sharding import CONTEXT, RULES, TENSOR

BATCH_AXES = RULES["batch"]


def zigzag_positions(length: int, context_size: int) -> np.ndarray:
    """The order in which a sequence must be laid out over a `context` axis: int32 [N], element n holds position p[n].

    Laid out so (`x[:, positions]`), device p of P holds the chunks p and 2P - 1 - p of 2P equal chunks, and all devices
    have the same number of (query, earlier key) pairs. `np.argsort(positions)` undoes it. The identity for one device.

    Raises:
      ValueError: 2P does not divide the length.
    """
    if context_size == 1:
        return np.arange(length, dtype=np.int32)
    chunks = 2 * context_size
    if length % chunks:
        raise ValueError(f"a sequence of {length} does not split into the {chunks} chunks of context={context_size}")
    first = np.arange(context_size)
    order = np.stack([first, chunks - 1 - first], axis=1).reshape(-1)
    return np.arange(length, dtype=np.int32).reshape(chunks, -1)[order].reshape(-1)


def sharded_selective_attention(
    q: Array, k: Array, v: Array, **options: Unpack[AttentionOptions]
) -> Array | tuple[Array, Array]:
    """`selective_attention` under the mesh that is set (`jax.set_mesh`), sharded over those of its axes that exist.

    The axes are `data` and `fsdp` (batch), `tensor` (heads) and `context` (sequence); axes of other names replicate the
    work. With no mesh, or inside a `shard_map`, it is `selective_attention` itself. The mesh may have Explicit or Auto
    axes.

    Arguments and results are `selective_attention`'s, with one difference: under a `context` axis of size P > 1 all
    arrays are laid out along N in the order of `zigzag_positions(N, P)`, the results too. The values in `evict_at` stay
    positions in the sequence.

    Raises:
      ValueError: as `selective_attention`, and where the mesh does not divide B, N, H or K. (K may also divide the
        size of `tensor`: then keys and values are replicated over it, and a shard reads the one head that it needs.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return selective_attention(q, k, v, **options)
    projections, seen, rule = checked(q, k, v, options)
    _check_divisible(q, k, mesh)
    batch_axes = tuple(name for name in BATCH_AXES if name in mesh.shape) or None
    heads, sequence = (name if name in mesh.shape else None for name in (TENSOR, CONTEXT))
    kv_heads = heads if k.shape[2] % mesh.shape.get(TENSOR, 1) == 0 else None
    q_spec, kv_spec = P(batch_axes, sequence, heads), P(batch_axes, sequence, kv_heads)
    row_spec = P(batch_axes, sequence)
    rows = projections.q_sel, projections.k_sel, seen.evict_at, seen.q_segment_ids
    # A number stays one: `math.inf` says something by itself. An array has to be passed in.
    bound = jnp.asarray(rule.logit_bound, jnp.float32) if isinstance(rule.logit_bound, Array) else None
    arrays = q, k, v, *rows, bound
    specs = q_spec, kv_spec, kv_spec, *(None if x is None else row_spec for x in rows), None if bound is None else P()
    if all(kind == AxisType.Explicit for kind in mesh.axis_types):
        arrays = jax.tree.map(jax.reshard, arrays, specs)

    def local(q, k, v, q_sel, k_sel, evict_at, segment_ids, logit_bound):
        own = _own_heads(Projections(q, k, v, q_sel, k_sel), projections.k.shape[2], rule.selection)
        known = rule if logit_bound is None else dataclasses.replace(rule, logit_bound=logit_bound)
        told = Seen.whole(segment_ids, evict_at), known
        attend = attend_whole if mesh.shape.get(CONTEXT, 1) == 1 else _attend_two_chunks
        out, forgotten = attend(own, *told, options.get("implementation"))
        return out if rule.tau is None else (out, forgotten)

    out_specs = q_spec if rule.tau is None else (q_spec, row_spec)
    # Without check_vma, whose types custom derivatives, loops and kernels would all have to carry.
    return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def _own_heads(projections: Projections, num_kv_heads: int, selection: Selection) -> Projections:
    """Inside `shard_map`: a shard's own heads, and what selects, from the shard that has head 0.

    `num_kv_heads` is the model's.
    """
    q, k, v, q_sel, k_sel = projections
    tensor = jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)
    if tensor == 1:
        return projections
    replicated = k.shape[2] == num_kv_heads
    if q_sel is None and selection is not Selection.OFF:
        q_sel = from_first_shard(q[:, :, 0], TENSOR)
        k_sel = k[:, :, 0] if replicated else from_first_shard(k[:, :, 0], TENSOR)
    if replicated:  # a shard's query heads all read the same key/value head
        head = jax.lax.axis_index(TENSOR) * num_kv_heads // tensor
        k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
    return Projections(q, k, v, q_sel, k_sel)


def _attend_two_chunks(
    projections: Projections, seen: Seen, rule: Rule, implementation: str | None
) -> tuple[Array, Array | None]:
    """Inside `shard_map`: this device's two chunks of queries over the keys of all devices."""
    module, context = implementation_module(implementation), jax.sharding.get_abstract_mesh().shape[CONTEXT]
    q_sel, k_sel = projections.selecting()
    k, v, k_sel, evict_at, segment_ids = jax.tree.map(
        _gather_sequence, (projections.k, projections.v, k_sel, seen.evict_at, seen.kv_segment_ids)
    )
    index, chunk = jax.lax.axis_index(CONTEXT), projections.q.shape[1] // 2
    numbers = [index, 2 * context - 1 - index]
    chunks = []  # of queries
    for number, rows in zip(numbers, (slice(0, chunk), slice(chunk, 2 * chunk)), strict=True):
        own_ids = None if seen.q_segment_ids is None else seen.q_segment_ids[:, rows]
        queries = Projections(projections.q[:, rows], k, v, q_sel[:, rows], k_sel)
        chunks.append((queries, Seen(number * chunk, own_ids, segment_ids, evict_at)))
    if rule.selection is Selection.OFF:
        f_starts = [jnp.zeros(k_sel.shape[:2], jnp.promote_types(q_sel.dtype, jnp.float32))] * 2
    else:
        sums = [module.column_sums(*queries.selecting(), sight, rule) for queries, sight in chunks]
        f_starts = _sums_of_earlier_chunks(jnp.stack(sums), numbers)
    parts = [module.attend(queries, f, sight, rule) for (queries, sight), f in zip(chunks, f_starts, strict=True)]
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), *parts)


def from_first_shard(x: Array, axis: str | None) -> Array:
    """Inside `shard_map`: shard 0's value on all shards of this axis; the transpose sums their gradients into it.

    With None, nothing is sharded: `x` itself.
    """
    return x if axis is None else jax.lax.psum(jnp.where(jax.lax.axis_index(axis) == 0, x, 0), axis)


def _gather_sequence(x: Array) -> Array:
    """The whole sequence in its own order, from the zig-zag: [B, Q, ...] of each device to [B, N, ...]."""
    x_PBQ = jax.lax.all_gather(x, CONTEXT)
    early, late = jnp.split(x_PBQ, 2, axis=2)
    ordered = jnp.moveaxis(jnp.concatenate([early, late[::-1]]), 0, 1)
    return ordered.reshape(x.shape[0], -1, *x.shape[2:])


def _sums_of_earlier_chunks(sums_2BN: Array, numbers: list[Array]) -> list[Array]:
    """F at the start of this device's two chunks: an exclusive prefix sum, over all chunks, of their column sums."""
    sums_P2BN = jax.lax.all_gather(sums_2BN, CONTEXT)
    all_numbers_P2 = jax.lax.all_gather(jnp.stack(numbers), CONTEXT)
    return [jnp.sum(sums_P2BN, axis=(0, 1), where=(all_numbers_P2 < n)[:, :, None, None]) for n in numbers]


def _check_divisible(q: Array, k: Array, mesh: AbstractMesh) -> None:
    batch, length, num_heads, _ = q.shape
    rows = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
    tensor, context = mesh.shape.get(TENSOR, 1), mesh.shape.get(CONTEXT, 1)
    if batch % rows:
        raise ValueError(f"a batch of {batch} does not divide over data x fsdp = {rows} devices")
    if num_heads % tensor:
        raise ValueError(f"{num_heads} query heads do not divide over tensor={tensor}")
    if k.shape[2] % tensor and tensor % k.shape[2]:
        raise ValueError(f"tensor={tensor} must divide the {k.shape[2]} key/value heads, or be divided by them")
    zigzag_positions(length, context)  # raises where 2 x context does not divide the length
