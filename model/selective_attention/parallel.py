"""Selective attention on a mesh: batch, heads and sequence sharded, by `jax.shard_map`.

- batch (`data`, `fsdp`): nothing to exchange.
- heads (`tensor`): every shard recomputes F from head 0's q and k, which are replicated; the transpose of the
  replication sums their gradients.
- sequence (`context`): every device holds two chunks of queries, gathers keys and values, and starts F from the sum of
  all earlier chunks' column sums, one vector [B, N] per chunk. The sequence is laid out in zig-zag order
  (`zigzag_positions`), so that causal work is even: device p of P holds the chunks p and 2P - 1 - p of 2P.

Shape letters: B batch, N positions, C chunk (N / 2P positions), H query heads, K key/value heads, D head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, P
from jax.sharding import AbstractMesh, AxisType

from .attention import check_arguments, implementation_module, selective_attention
from .selection import Selection

BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
SEQUENCE_AXIS = "context"


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
        return selective_attention(
            q,
            k,
            v,
            q_sel=q_sel,
            k_sel=k_sel,
            scale=scale,
            evict_at=evict_at,
            segment_ids=segment_ids,
            selection=selection,
            memory_tau=memory_tau,
            logit_bound=logit_bound,
            implementation=implementation,
        )
    selection = Selection(selection)
    check_arguments(q, k, v, q_sel, k_sel, evict_at, segment_ids, selection)
    batch_axes = tuple(name for name in BATCH_AXES if name in mesh.shape) or None
    heads = HEAD_AXIS if HEAD_AXIS in mesh.shape else None
    sequence = SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.shape else None
    _check_divisible(q, k, mesh)
    kv_heads = heads if k.shape[2] % mesh.shape.get(HEAD_AXIS, 1) == 0 else None
    q_spec, kv_spec = P(batch_axes, sequence, heads), P(batch_axes, sequence, kv_heads)
    row_spec = P(batch_axes, sequence)
    rows = q_sel, k_sel, evict_at, segment_ids
    bound = None if logit_bound is None else jnp.asarray(logit_bound, jnp.float32)
    arrays = q, k, v, *rows, bound
    specs = q_spec, kv_spec, kv_spec, *(None if x is None else row_spec for x in rows), None if bound is None else P()
    if all(kind == AxisType.Explicit for kind in mesh.axis_types):
        arrays = jax.tree.map(jax.reshard, arrays, specs)
    local = functools.partial(
        _attend_shard,
        num_kv_heads=k.shape[2],
        tensor=mesh.shape.get(HEAD_AXIS, 1),
        context=mesh.shape.get(SEQUENCE_AXIS, 1),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        selection=selection,
        memory_tau=memory_tau,
        implementation=implementation,
    )
    out_specs = q_spec if memory_tau is None else (q_spec, row_spec)
    # Without check_vma, whose types custom derivatives, loops and kernels would all have to carry.
    return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def _attend_shard(
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array | None,
    k_sel: Array | None,
    evict_at: Array | None,
    segment_ids: Array | None,
    logit_bound: Array | None,
    *,
    num_kv_heads: int,
    tensor: int,
    context: int,
    scale: float,
    selection: Selection,
    memory_tau: float | None,
    implementation: str | None,
) -> Array | tuple[Array, Array]:
    """One device's part, inside shard_map. `num_kv_heads` is the model's; `tensor`, `context` are the axes' sizes."""
    if tensor > 1:
        replicated = k.shape[2] == num_kv_heads
        if q_sel is None and selection is not Selection.OFF:
            q_sel = _from_first_shard(q[:, :, 0])
            k_sel = k[:, :, 0] if replicated else _from_first_shard(k[:, :, 0])
        if replicated:  # a shard's query heads all read the same key/value head
            head = jax.lax.axis_index(HEAD_AXIS) * num_kv_heads // tensor
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
    if context == 1:
        return selective_attention(
            q,
            k,
            v,
            q_sel=q_sel,
            k_sel=k_sel,
            scale=scale,
            evict_at=evict_at,
            segment_ids=segment_ids,
            selection=selection,
            memory_tau=memory_tau,
            logit_bound=logit_bound,
            implementation=implementation,
        )

    q_sel = q[:, :, 0] if q_sel is None else q_sel
    k_sel = k[:, :, 0] if k_sel is None else k_sel
    keys = jax.tree.map(
        _gather_sequence, {"k": k, "v": v, "k_sel": k_sel, "evict_at": evict_at, "segment": segment_ids}
    )
    module = implementation_module(implementation)
    index = jax.lax.axis_index(SEQUENCE_AXIS)
    chunks = []  # of queries
    chunk = q.shape[1] // 2
    for number, start in ((index, 0), (2 * context - 1 - index, chunk)):
        rows = slice(start, start + chunk)
        options = {"offset": number * chunk, "scale": scale, "selection": selection}
        options["q_segment_ids"] = None if segment_ids is None else segment_ids[:, rows]
        options["kv_segment_ids"] = keys["segment"]
        chunks.append((number, q[:, rows], q_sel[:, rows], options))

    if selection is Selection.OFF:
        f_starts = [jnp.zeros(keys["k_sel"].shape[:2], jnp.promote_types(q.dtype, jnp.float32))] * 2
    else:
        sums = [module.column_sums(q_sel, keys["k_sel"], **options) for _, _, q_sel, options in chunks]
        f_starts = _sums_of_earlier_chunks(jnp.stack(sums), [number for number, *_ in chunks])
    parts = [
        module.attend(
            q,
            keys["k"],
            keys["v"],
            q_sel,
            keys["k_sel"],
            f,
            evict_at=keys["evict_at"],
            tau=memory_tau,
            logit_bound=logit_bound,
            **options,
        )
        for (_, q, q_sel, options), f in zip(chunks, f_starts, strict=True)
    ]
    out, forgotten = jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), *parts)
    return out if memory_tau is None else (out, forgotten)


def _from_first_shard(x: Array) -> Array:
    """Shard 0's value on all shards of the head axis; the transpose sums their gradients into shard 0's."""
    return jax.lax.psum(jnp.where(jax.lax.axis_index(HEAD_AXIS) == 0, x, 0), HEAD_AXIS)


def _gather_sequence(x: Array) -> Array:
    """The whole sequence in its own order, from the zig-zag: [B, 2 C, ...] of each device to [B, N, ...]."""
    x_PBC = jax.lax.all_gather(x, SEQUENCE_AXIS)
    early, late = jnp.split(x_PBC, 2, axis=2)
    ordered = jnp.moveaxis(jnp.concatenate([early, late[::-1]]), 0, 1)
    return ordered.reshape(x.shape[0], -1, *x.shape[2:])


def _sums_of_earlier_chunks(sums_SBN: Array, numbers: list[Array]) -> list[Array]:
    """F at the start of this device's two chunks: an exclusive prefix sum, over all chunks, of their column sums."""
    sums_PSBN = jax.lax.all_gather(sums_SBN, SEQUENCE_AXIS)
    all_numbers_PS = jax.lax.all_gather(jnp.stack(numbers), SEQUENCE_AXIS)
    return [jnp.sum(sums_PSBN, axis=(0, 1), where=(all_numbers_PS < n)[:, :, None, None]) for n in numbers]


def _check_divisible(q: Array, k: Array, mesh: AbstractMesh) -> None:
    batch, length, num_heads, _ = q.shape
    rows = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
    tensor, context = mesh.shape.get(HEAD_AXIS, 1), mesh.shape.get(SEQUENCE_AXIS, 1)
    if batch % rows:
        raise ValueError(f"a batch of {batch} does not divide over data x fsdp = {rows} devices")
    if num_heads % tensor:
        raise ValueError(f"{num_heads} query heads do not divide over tensor={tensor}")
    if k.shape[2] % tensor and tensor % k.shape[2]:
        raise ValueError(f"tensor={tensor} must divide the {k.shape[2]} key/value heads, or be divided by them")
    zigzag_positions(length, context)  # raises where 2 x context does not divide the length
