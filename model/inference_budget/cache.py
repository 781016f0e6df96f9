"""The pruned cache: as many slots in each layer as its budget, and tokens that left for good.

Decoding reuses a slot in place, and keys stay rotated at their absolute positions; only after a block of tokens, as in
a prefill, is what is left gathered into the slots anew. Shape letters: README.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, P

from selective_attention import Cache, Selection, TransformerConfig, init_cache, partition_spec
from selective_attention.quantised import Quantised, check_cache_dtype, is_int8, quantise, selecting_dtype
from selective_attention.selection import Projections
from selective_attention.sharding import RULES
from selective_attention.slots import (
    Slots,
    heads_as_slots,
    scale_shape,
    scales_as_slots,
    slots_as_heads,
    slots_as_scales,
    slots_shape,
    take_in,
)

from .budgets import Budgets, check_budgets
from .eviction import (
    NEVER,
    Arriving,
    Columns,
    attend_evicting,
    heads_as_rows,
    over_heads,
    protected,
    victim,
)
from .policies import EvictionPolicy, Held, check_policy

LEAST_SLOTS = 128  # that a block of tokens attends to, where fewer are used; below, nothing is saved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedLayerCache:
    """One layer's slots; a `selective_attention.LayerCache`. A free slot has position -1."""

    k: Array  # [B, K, M, D], or as `slots_shape` says
    v: Array  # the same
    k_sel: Array | None  # [B, 1, M, D], only where the selecting head has its own projections
    position: Array  # int32 [B, R, M], of each slot's token
    f: Array | None  # float32 [B, R, M], F of the next query; None in a model without selection
    score: Array | None  # float32 [B, R, M], the policy's, if it keeps one
    scale: Array | None  # of int8 keys and values, as in `Slots`
    policy: EvictionPolicy = dataclasses.field(metadata={"static": True})
    config: TransformerConfig = dataclasses.field(metadata={"static": True})
    layer: int = dataclasses.field(metadata={"static": True})

    @property
    def budget(self) -> int:
        """Tokens that it can hold."""
        return self.position.shape[-1]

    @property
    def fused(self) -> bool:
        """Whether the TPU kernel decodes, which gives no weights that a policy could judge by."""
        return is_fused(self.config, self.policy, self.k.dtype)

    def attend(
        self, position_B: Array, q: Array, k: Array, v: Array, q_sel: Array | None, k_sel: Array | None
    ) -> tuple[Array, "PrunedLayerCache"]:
        """As `LayerCache.attend`: makes room if there is none, takes the token in, then attends."""
        return on_shards(_attend_one, self, position_B, Projections(q, k, v, q_sel, k_sel))

    def take_in(
        self,
        position_B: Array,
        count_B: Array,
        q: Array,
        k: Array,
        v: Array,
        q_sel: Array | None,
        k_sel: Array | None,
        *,
        empty: bool,
    ) -> tuple[Array, "PrunedLayerCache"]:
        """Takes in T tokens in one parallel pass, with the evictions of taking them in one by one.

        The projections are as in `Projections`; row b has `count_B[b]` tokens, the first at `position_B[b]`, and the
        rest is padding. `empty` says that the cache is, which saves attending to its free slots.
        """
        take_in = functools.partial(_take_in, empty=empty)
        return on_shards(take_in, self, position_B, Projections(q, k, v, q_sel, k_sel), count_B)


def init_pruned_cache(
    config: TransformerConfig, batch: int, budgets: Budgets, policy: EvictionPolicy, dtype: Any = None
) -> Cache:
    """An empty cache for `batch` rows; keys and values in `dtype`, by default the model's, or "int8" with scales.

    Raises:
      BudgetsError: budgets that are not this model's, or a policy that is not defined on it.
      ValueError: another dtype.
    """
    c, dtype = config, check_cache_dtype(dtype, config.dtype)
    check_budgets(budgets, c)
    check_policy(policy, c)
    groups = c.num_kv_heads if policy.per_head else 1
    float_dtype = jnp.promote_types(c.dtype, jnp.float32)

    def zeros(axes: tuple[str | None, ...], shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros(shape, dtype, out_sharding=partition_spec(axes, shape))

    fused, layers = is_fused(c, policy, dtype), []
    for layer, budget in enumerate(budgets.tokens):
        slots = functools.partial(zeros, ("batch", "kv_heads", None, None))
        state = functools.partial(zeros, ("batch", "kv_heads", None), (batch, groups, budget))
        kv_shape = slots_shape(batch, c.num_kv_heads, budget, c.head_dim, fused=fused, dtype=dtype)
        sel_shape = slots_shape(batch, 1, budget, c.head_dim, fused=fused, dtype=dtype)
        scales = scale_shape(batch, c.num_kv_heads, budget, fused=fused)
        own_head = c.selection is Selection.OWN_HEAD
        cache = PrunedLayerCache(
            k=slots(kv_shape, dtype),
            v=slots(kv_shape, dtype),
            k_sel=slots(sel_shape, selecting_dtype(dtype, c.dtype)) if own_head else None,
            position=state(jnp.int32) - 1,
            f=None if c.selection is Selection.OFF else state(float_dtype),
            score=state(float_dtype) if policy.keeps_score else None,
            scale=slots(scales, jnp.bfloat16) if is_int8(dtype) else None,
            policy=policy,
            config=c,
            layer=layer,
        )
        layers.append(cache)
    return Cache(zeros(("batch",), (batch,), jnp.int32), tuple(layers))


def is_fused(config: TransformerConfig, policy: EvictionPolicy, dtype: Any) -> bool:
    """Whether the TPU kernel decodes with keys and values of this dtype."""
    return config.fuses_decoding(dtype) and not (policy.keeps_score or policy.per_head)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all arrays of the layers, over all devices."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))


def memory_factor(cache: Cache, context_length: int) -> float:
    """How many times the bytes of `cache` a full cache has, for as many rows of `context_length` tokens.

    Of the arrays themselves: what else a slot keeps beside its key and value makes it a little less than
    `Budgets.memory_factor`, which counts tokens.
    """
    layer = cast(PrunedLayerCache, cache.layers[0])
    sizes = layer.config, layer.k.shape[0], context_length, layer.k.dtype
    return cache_bytes(jax.eval_shape(lambda: init_cache(*sizes))) / cache_bytes(cache)


def _attend_one(
    cache: PrunedLayerCache, position_B: Array, new: Projections, *, heads_axis: str | None
) -> tuple[Array, PrunedLayerCache]:
    """Takes in one token a row."""
    c, groups = cache.config, cache.position.shape[1]
    now_B = jnp.repeat(position_B, groups)
    position_BM, f_BM, score_BM = _state_rows(cache.position), _state_rows(cache.f), _state_rows(cache.score)
    held = Held(position_BM, f_BM, score_BM, now_B[:, None], cache.budget, cache.layer)
    if cache.policy.shrinks:
        position_BM = jnp.where(cache.policy.forgets(held), -1, position_BM)
    slot_B = victim(protected(cache.policy.priority(held), position_BM), position_BM)
    rows = Projections(
        new.q.reshape(new.q.shape[0] * groups, 1, -1, c.head_dim),
        _slot_rows(new.k[:, 0], groups)[:, None],
        _slot_rows(new.v[:, 0], groups)[:, None],
        new.q_sel,
        new.k_sel,
    )
    k, v, scale = (_slot_rows(x, groups) for x in (cache.k, cache.v, cache.scale))
    slots = Slots(k, v, cache.k_sel, position_BM, f_BM, scale)
    out, after, weights_BM = take_in(rows, slots, slot_B, now_B, c.selection, fused=cache.fused, heads_axis=heads_axis)
    if score_BM is not None and weights_BM is not None:
        here_BM = jnp.arange(cache.budget) == slot_B[:, None]
        weights_BM = over_heads(weights_BM, heads_axis)
        score_BM = cache.policy.observe(jnp.where(here_BM, 0, score_BM), weights_BM)
    cache = dataclasses.replace(
        cache,
        k=after.k.reshape(cache.k.shape),
        v=after.v.reshape(cache.v.shape),
        k_sel=after.k_sel,
        position=_as_state(after.position, cache.position),
        f=_as_state(after.f, cache.f),
        score=_as_state(score_BM, cache.score),
        scale=_as_state(after.scale, cache.scale),
    )
    return out.reshape(new.q.shape), cache


def _take_in(
    cache: PrunedLayerCache, position_B: Array, new: Projections, count_B: Array, *, empty: bool, heads_axis: str | None
) -> tuple[Array, PrunedLayerCache]:
    """Takes in T tokens a row."""
    arriving = Arriving(position_B, count_B, jnp.full_like(position_B, cache.budget), cache.layer)
    quantised = None
    if cache.scale is not None:
        # Queries see what the cache gives back, and what it holds is moved as it is: nothing is rounded twice.
        quantised = quantise(new.k), quantise(new.v)
        k, v = (x.floats(new.q.dtype) for x in quantised)
        new = new._replace(k=k, v=v)

    def after_first(slots: int) -> tuple[Array, PrunedLayerCache]:
        """Where all that is held is in so many first slots."""
        held = jax.tree.map(lambda x: x[:, :slots], _columns(cache, new.k.shape[2])) if slots else None
        kept = None if quantised is None else _quantised_columns(cache, quantised, slots)
        out, columns, _ = attend_evicting(cache.policy, cache.config, held, new, arriving, heads_axis)
        return out, _gathered(cache, columns, kept)

    if empty or not cache.policy.shrinks:
        return after_first(0 if empty else cache.budget)
    # Free slots cost as much as others: of a few sizes the smallest that has all which are not.
    sizes = sorted({max(cache.budget // part, min(LEAST_SLOTS, cache.budget)) for part in (1, 2, 8)})
    used = jnp.max(jnp.where(cache.position >= 0, jnp.arange(1, cache.budget + 1), 0))
    size = jnp.sum(used > jnp.array(sizes[:-1], jnp.int32))
    return jax.lax.switch(size, [functools.partial(after_first, slots) for slots in sizes])


def _columns(cache: PrunedLayerCache, num_kv_heads: int) -> Columns:
    """The slots as columns of a block, int8 ones as the numbers that they stand for."""
    if cache.scale is None:
        k, v = (_heads(cache, x, num_kv_heads) for x in (cache.k, cache.v))
    else:
        k, v = (x.floats(cache.config.dtype) for x in _quantised(cache, num_kv_heads))
    return Columns(
        k=k,
        v=v,
        k_sel=None if cache.k_sel is None else _heads(cache, cache.k_sel, 1)[:, :, 0],
        position=_state_rows(cache.position),
        f=_state_rows(cache.f),
        score=_state_rows(cache.score),
    )


def _heads(cache: PrunedLayerCache, x: Array, num_heads: int) -> Array:
    """Keys or values [B * R, M, K / R, D] of the slots."""
    x = _slot_rows(x, cache.position.shape[1])
    return slots_as_heads(x, cache.budget, cache.config.head_dim, num_heads, fused=cache.fused)


def _quantised(cache: PrunedLayerCache, num_kv_heads: int) -> list[Quantised]:
    """The keys and the values of int8 slots."""
    scales = slots_as_scales(_slot_rows(cache.scale, cache.position.shape[1]), num_kv_heads, fused=cache.fused)
    return [Quantised(_heads(cache, x, num_kv_heads), s) for x, s in zip((cache.k, cache.v), scales, strict=True)]


def _quantised_columns(cache: PrunedLayerCache, new: Sequence[Quantised], slots: int) -> list[Quantised]:
    """The keys and the values of the first int8 slots and of a block's tokens [B, T, K, D], as columns."""
    groups, num_kv_heads = cache.position.shape[1], new[0].values.shape[2]
    rows = [Quantised(heads_as_rows(x.values, groups), heads_as_rows(x.scale[..., None], groups)[..., 0]) for x in new]
    if not slots:
        return rows
    held = jax.tree.map(lambda x: x[:, :slots], _quantised(cache, num_kv_heads))
    return jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), held, rows)


def _gathered(cache: PrunedLayerCache, columns: Columns, quantised: Sequence[Quantised] | None) -> PrunedLayerCache:
    """The cache with what is left of the columns after a block in its slots, oldest first.

    Of an int8 cache `quantised` has the columns' keys and values.
    """
    num_columns = columns.position.shape[1]
    age_BM = jnp.where(columns.position >= 0, columns.position, NEVER)
    order_BM = jnp.argsort(age_BM, axis=1)[:, : cache.budget]
    free = max(cache.budget - num_columns, 0)

    def left(x: Array) -> Array:
        return jnp.take_along_axis(x, order_BM.reshape(*order_BM.shape, *(1,) * (x.ndim - 2)), axis=1)

    def gathered(x: Array, like: Array, fill: int = 0) -> Array:
        kept = left(x)
        if x.ndim == 4:
            rows = _slot_rows(like, cache.position.shape[1])
            return heads_as_slots(kept, rows, fused=cache.fused).reshape(like.shape)
        return jnp.pad(kept, ((0, 0), (0, free)), constant_values=fill).reshape(like.shape).astype(like.dtype)

    def gathered_if(x: Array | None, like: Array | None) -> Array | None:
        return None if x is None or like is None else gathered(x, like)

    scale = cache.scale
    if scale is not None and quantised is not None:
        k, v = quantised
        columns = columns._replace(k=k.values, v=v.values)
        rows = _slot_rows(scale, cache.position.shape[1])
        scale = scales_as_slots(left(k.scale), left(v.scale), rows, fused=cache.fused).reshape(scale.shape)
    return dataclasses.replace(
        cache,
        k=gathered(columns.k, cache.k),
        v=gathered(columns.v, cache.v),
        k_sel=gathered_if(None if columns.k_sel is None else columns.k_sel[:, :, None], cache.k_sel),
        position=gathered(columns.position, cache.position, fill=-1),
        f=gathered_if(columns.f, cache.f),
        score=gathered_if(columns.score, cache.score),
        scale=scale,
    )


def _state_rows(x: Any) -> Any:
    """[B, R, M] -> [B * R, M]; None stays None."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _as_state(x_BM: Any, like: Any) -> Any:
    """[B * R, M] -> [B, R, M]; None stays None."""
    return None if x_BM is None else x_BM.reshape(like.shape)


def _slot_rows(x: Any, groups: int) -> Any:
    """[B, K, ...] -> [B * R, K / R, ...]; None stays None."""
    return None if x is None else x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def on_shards(
    function: Callable[..., tuple[Array, PrunedLayerCache]],
    cache: PrunedLayerCache,
    position_B: Array,
    new: Projections,
    *more_B: Array,
) -> tuple[Array, PrunedLayerCache]:
    """`function(cache, position_B, new, *more_B, heads_axis=...)`, on every device's rows and heads if a mesh is set.

    Where the mesh does not divide the key/value heads, all devices of `tensor` do the same work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(cache, position_B, new, *more_B, heads_axis=None)
    axes = RULES["kv_heads"][0]
    sharded = mesh.shape.get(axes, 1) > 1 and cache.k.shape[1] % mesh.shape[axes] == 0
    heads = axes if sharded else None
    batch = (partition_spec(("batch",), cache.k.shape[:1]) or P(None))[0]
    slots: Any = P(batch, heads)
    state: Any = P(batch, heads if cache.position.shape[1] > 1 else None)
    projection: Any = P(batch, None, heads)

    def spec(x: Array | None, spec: P) -> Any:
        return None if x is None else spec

    cache_specs = dataclasses.replace(
        cache,
        k=slots,
        v=slots,
        k_sel=spec(cache.k_sel, P(batch)),
        position=state,
        f=spec(cache.f, state),
        score=spec(cache.score, state),
        scale=spec(cache.scale, slots),
    )
    new_specs = Projections(projection, projection, projection, spec(new.q_sel, P(batch)), spec(new.k_sel, P(batch)))
    specs = [cache_specs, P(batch), new_specs, *[P(batch)] * len(more_B)]
    arrays = jax.tree.map(jax.reshard, [cache, position_B, new, *more_B], specs)
    # Heads that evict for themselves have nothing to tell each other.
    local = functools.partial(function, heads_axis=None if cache.policy.per_head else heads)
    mapped = jax.shard_map(local, in_specs=tuple(specs), out_specs=(projection, cache_specs), check_vma=False)
    return mapped(*arrays)
