"""The pruned cache: as many slots in each layer as its budget, and tokens that left for good.

A slot is reused in place, so keys stay where they are, rotated at their absolute positions; nothing is ever compacted.

Shape letters: B batch, T new tokens, M slots of a layer (its budget), H query heads, K key/value heads, D head width,
R sets of evictions per sequence: 1, or K for a policy that evicts per head, whose heads then are rows of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, P

from selective_attention import Cache, Selection, TransformerConfig, partition_spec
from selective_attention.attention import implementation_module
from selective_attention.sharding import RULES
from selective_attention.transformer.decoding import attend_slots, write

from .budgets import Budgets
from .eviction import Columns, evict, of_head_zero, over_heads, protected, victim
from .policies import EvictionPolicy, Held, check_policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedLayerCache:
    """One layer's slots; a `selective_attention.LayerCache`. A free slot has position -1."""

    k: Array  # [B, K, M, D]
    v: Array  # [B, K, M, D]
    k_sel: Array | None  # [B, 1, M, D], only where the selecting head has its own projections
    position: Array  # int32 [B, R, M], of each slot's token
    f: Array | None  # float32 [B, R, M], F of the next query; None in a model without selection
    score: Array | None  # float32 [B, R, M], the policy's, if it keeps one
    policy: EvictionPolicy = dataclasses.field(metadata={"static": True})
    config: TransformerConfig = dataclasses.field(metadata={"static": True})
    layer: int = dataclasses.field(metadata={"static": True})

    @property
    def budget(self) -> int:
        """Tokens that it can hold."""
        return self.position.shape[-1]

    def attend(
        self, position_B: Array, q: Array, k: Array, v: Array, q_sel: Array | None, k_sel: Array | None
    ) -> tuple[Array, "PrunedLayerCache"]:
        """As `LayerCache.attend`: makes room if there is none, takes the token in, then attends."""
        return on_shards(_attend_one, self, self, position_B, q, k, v, q_sel, k_sel)

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

        The projections are [B, T, heads, D]; row b has `count_B[b]` tokens, the first at `position_B[b]`, and the rest
        is padding. `empty` says that the cache is, which saves attending to its free slots.
        """
        take_in = functools.partial(_take_in, empty=empty)
        return on_shards(take_in, self, self, position_B, q, k, v, q_sel, k_sel, count_B)


def init_pruned_cache(
    config: TransformerConfig, batch: int, budgets: Budgets, policy: EvictionPolicy, dtype: Any = None
) -> Cache:
    """An empty cache for `batch` rows; keys and values in `dtype`, by default the model's.

    Raises:
      ValueError: budgets for another number of layers, or a policy that is not defined on this model.
    """
    c, dtype = config, jnp.dtype(dtype or config.dtype)
    budgets.check_layers(c.num_layers)
    check_policy(policy, c)
    groups = c.num_kv_heads if policy.per_head else 1
    float_dtype = jnp.promote_types(c.dtype, jnp.float32)

    def zeros(axes: tuple[str | None, ...], shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros(shape, dtype, out_sharding=partition_spec(axes, shape))

    layers = []
    for layer, budget in enumerate(budgets.tokens):
        slots = functools.partial(zeros, ("batch", "kv_heads", None, None))
        state = functools.partial(zeros, ("batch", "kv_heads", None), (batch, groups, budget))
        kv_shape = batch, c.num_kv_heads, budget, c.head_dim
        own_head = c.selection is Selection.OWN_HEAD
        cache = PrunedLayerCache(
            k=slots(kv_shape, dtype),
            v=slots(kv_shape, dtype),
            k_sel=slots((batch, 1, budget, c.head_dim), dtype) if own_head else None,
            position=state(jnp.int32) - 1,
            f=None if c.selection is Selection.OFF else state(float_dtype),
            score=state(float_dtype) if policy.keeps_score else None,
            policy=policy,
            config=c,
            layer=layer,
        )
        layers.append(cache)
    return Cache(zeros(("batch",), (batch,), jnp.int32), tuple(layers))


def cache_bytes(cache: Cache) -> int:
    """Bytes of all arrays of the layers, over all devices."""
    return sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def memory_factor(caches: Sequence[PrunedLayerCache], context_length: int) -> float:
    """`L N / sum_l K_l`, from the slots that are allocated."""
    return len(caches) * context_length / sum(cache.k.shape[2] for cache in caches)


def _attend_one(
    cache: PrunedLayerCache,
    position_B: Array,
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array | None,
    k_sel: Array | None,
    *,
    heads_axis: str | None,
) -> tuple[Array, PrunedLayerCache]:
    c, groups = cache.config, cache.position.shape[1]
    now_B = jnp.repeat(position_B, groups)
    position_BM, f_BM, score_BM = _state_rows(cache.position), _state_rows(cache.f), _state_rows(cache.score)
    held = Held(position_BM, f_BM, score_BM, now_B[:, None], cache.budget, cache.layer)
    slot_B = victim(protected(cache.policy.priority(held), position_BM), position_BM)
    here_BM = jnp.arange(cache.budget) == slot_B[:, None]
    position_BM = jnp.where(here_BM, now_B[:, None], position_BM)
    k_BKMD = write(_slot_rows(cache.k, groups), _slot_rows(k[:, 0], groups), slot_B)
    v_BKMD = write(_slot_rows(cache.v, groups), _slot_rows(v[:, 0], groups), slot_B)
    k_sel_BKMD = None if cache.k_sel is None or k_sel is None else write(cache.k_sel, k_sel, slot_B)
    out, f_BM, weights_BM = attend_slots(
        q.reshape(q.shape[0] * groups, 1, -1, c.head_dim),
        k_BKMD,
        v_BKMD,
        None if f_BM is None else jnp.where(here_BM, 0, f_BM),
        q_sel=q_sel,
        k_sel=None if k_sel_BKMD is None else k_sel_BKMD[:, 0],
        position_B=now_B,
        slot_position_BM=position_BM,
        selection=c.selection,
        share_selection=functools.partial(of_head_zero, heads_axis=heads_axis),
    )
    if score_BM is not None:
        weights_BM = over_heads(weights_BM, heads_axis)
        score_BM = cache.policy.observe(jnp.where(here_BM, 0, score_BM), weights_BM)
    after = dataclasses.replace(
        cache,
        k=k_BKMD.reshape(cache.k.shape),
        v=v_BKMD.reshape(cache.v.shape),
        k_sel=k_sel_BKMD,
        position=position_BM.reshape(cache.position.shape),
        f=None if f_BM is None or cache.f is None else f_BM.reshape(cache.f.shape),
        score=None if score_BM is None or cache.score is None else score_BM.reshape(cache.score.shape),
    )
    return out.reshape(q.shape), after


def _take_in(
    cache: PrunedLayerCache,
    position_B: Array,
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array | None,
    k_sel: Array | None,
    count_B: Array,
    *,
    empty: bool,
    heads_axis: str | None,
) -> tuple[Array, PrunedLayerCache]:
    out, columns = attend_evicting(
        cache.policy,
        cache.config,
        None if empty else cache,
        q,
        k,
        v,
        q_sel,
        k_sel,
        start_B=position_B,
        count_B=count_B,
        budget_B=jnp.full_like(position_B, cache.budget),
        layer=cache.layer,
        heads_axis=heads_axis,
    )[:2]
    return out, _compacted(cache, columns)


def attend_evicting(
    policy: EvictionPolicy,
    config: TransformerConfig,
    cache: PrunedLayerCache | None,
    q: Array,
    k: Array,
    v: Array,
    q_sel: Array | None,
    k_sel: Array | None,
    *,
    start_B: Array,
    count_B: Array,
    budget_B: Array,
    layer: Array | int,
    heads_axis: str | None = None,
) -> tuple[Array, Columns, Array]:
    """Attention of T new tokens over a layer's slots and themselves, with the policy's evictions on the way.

    Args:
      policy, config: who leaves; the model's.
      cache: the slots, None for none.
      q, k, v, q_sel, k_sel: a block's projections [B, T, ...] of the new tokens.
      start_B, count_B, budget_B, layer, heads_axis: as in `evict`; the budget may be traced.

    Returns:
      out [B, T, H, D]; the columns after the last token, with R rows a sequence; and from which query on each column is
      hidden, int32 [B * R, M], counted in columns: positions where there is no cache.
    """
    groups = k.shape[2] if policy.per_head else 1
    start_B, count_B, budget_B = (jnp.repeat(x, groups) for x in (start_B, count_B, budget_B))
    q_rows, k, v = (_heads_as_rows(x, groups) for x in (q, k, v))
    length = q.shape[1]
    t_T = jnp.arange(length, dtype=jnp.int32)
    position = jnp.where(t_T < count_B[:, None], start_B[:, None] + t_T, -1)
    zeros = jnp.zeros(position.shape, jnp.promote_types(q.dtype, jnp.float32))
    f = None if config.selection is Selection.OFF else zeros
    score = zeros if policy.keeps_score else None
    if cache is not None:
        k, v = (
            jnp.concatenate([jnp.swapaxes(_slot_rows(old, groups), 1, 2).astype(new.dtype), new], axis=1)
            for old, new in ((cache.k, k), (cache.v, v))
        )
        if cache.k_sel is not None and k_sel is not None:
            k_sel = jnp.concatenate([cache.k_sel[:, 0].astype(k_sel.dtype), k_sel], axis=1)
        position = jnp.concatenate([_state_rows(cache.position), position], axis=1)
        f, score = (
            None if old is None else jnp.concatenate([_state_rows(old), zeros], axis=1)
            for old in (cache.f, cache.score)
        )
    if q_sel is None or k_sel is None:
        q_sel, k_sel = of_head_zero(q_rows[:, :, 0], heads_axis), of_head_zero(k[:, :, 0], heads_axis)
    hidden_at, columns = evict(
        policy,
        Columns(k, v, k_sel, position, f, score),
        q_rows,
        q_sel,
        start_B=start_B,
        count_B=count_B,
        budget_B=budget_B,
        layer=layer,
        selection=config.selection,
        heads_axis=heads_axis,
    )
    out, _ = implementation_module(config.attention).attend(
        q_rows,
        k,
        v,
        q_sel,
        k_sel,
        jnp.zeros(position.shape, zeros.dtype) if f is None else f,
        offset=position.shape[1] - length,
        evict_at=hidden_at,
        q_segment_ids=None,
        kv_segment_ids=None,
        scale=config.head_dim**-0.5,
        selection=config.selection,
        tau=None,
    )
    return _rows_as_heads(out, q.shape), columns, hidden_at


def _compacted(cache: PrunedLayerCache, columns: Columns) -> PrunedLayerCache:
    """What is left after a block, gathered into the cache's slots, oldest first."""
    budget, (rows, num_columns) = cache.budget, columns.position.shape
    groups = cache.position.shape[1]
    age_BM = jnp.where(columns.position >= 0, columns.position, jnp.iinfo(jnp.int32).max)
    order_BM = jnp.argsort(age_BM, axis=1)[:, :budget]
    free = max(budget - num_columns, 0)

    def gathered(x: Array, fill: float, shape: tuple[int, ...]) -> Array:
        index = order_BM.reshape(*order_BM.shape, *(1,) * (x.ndim - 2))
        kept = jnp.take_along_axis(x, index, axis=1)
        kept = jnp.pad(kept, ((0, 0), (0, free), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return (jnp.swapaxes(kept, 1, 2) if x.ndim == 4 else kept).reshape(shape)

    def kept_or_none(x: Array | None, like: Array | None) -> Array | None:
        return None if x is None or like is None else gathered(x, 0, like.shape)

    return dataclasses.replace(
        cache,
        k=gathered(columns.k, 0, cache.k.shape).astype(cache.k.dtype),
        v=gathered(columns.v, 0, cache.v.shape).astype(cache.v.dtype),
        k_sel=None
        if cache.k_sel is None
        else gathered(columns.k_sel[:, :, None], 0, cache.k_sel.shape).astype(cache.k_sel.dtype),
        position=gathered(columns.position, -1, (rows // groups, groups, budget)),
        f=kept_or_none(columns.f, cache.f),
        score=kept_or_none(columns.score, cache.score),
    )


def _state_rows(x: Any) -> Any:
    """[B, R, M] -> [B * R, M]; None stays None."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _slot_rows(x: Array, groups: int) -> Array:
    """[B, K, ...] -> [B * R, K / R, ...]."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def _heads_as_rows(x: Array, groups: int) -> Array:
    """[B, T, heads, D] -> [B * R, T, heads / R, D]."""
    batch, length, heads, width = x.shape
    split = jnp.moveaxis(x.reshape(batch, length, groups, heads // groups, width), 2, 1)
    return split.reshape(batch * groups, length, heads // groups, width)


def _rows_as_heads(x: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_heads_as_rows`."""
    groups = x.shape[0] // shape[0]
    return jnp.moveaxis(x.reshape(shape[0], groups, *x.shape[1:]), 1, 2).reshape(shape)


def on_shards(
    function: Callable[..., tuple[Array, PrunedLayerCache]],
    cache: PrunedLayerCache,
    *arguments: Any,
) -> tuple[Array, PrunedLayerCache]:
    """`function(*arguments, heads_axis=...)`, on every device's batch rows and heads if a mesh is set.

    The arguments are those of `_attend_one`, and whatever follows them has one entry a sequence. Where the mesh does
    not divide the key/value heads, all devices of `tensor` do the same work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arguments, heads_axis=None)
    axes = RULES["kv_heads"][0]
    sharded = mesh.shape.get(axes, 1) > 1 and cache.k.shape[1] % mesh.shape[axes] == 0
    heads = axes if sharded else None
    batch = (partition_spec(("batch",), cache.k.shape[:1]) or P(None))[0]
    slots, state = P(batch, heads), P(batch, heads if cache.position.shape[1] > 1 else None)
    specs_by_name: dict[str, Any] = {
        "k": slots,
        "v": slots,
        "k_sel": None if cache.k_sel is None else P(batch),
        "position": state,
        "f": None if cache.f is None else state,
        "score": None if cache.score is None else state,
    }
    cache_specs = dataclasses.replace(cache, **specs_by_name)
    projections = P(batch, None, heads)
    _, position_B, *rest = arguments
    specs = [cache_specs, P(batch), *[projections] * 3, *(None if x is None else P(batch) for x in rest[3:])]
    arrays = jax.tree.map(jax.reshard, [cache, position_B, *rest], specs)
    # Heads that evict for themselves have nothing to tell each other.
    local = functools.partial(function, heads_axis=None if cache.policy.per_head else heads)
    mapped = jax.shard_map(local, in_specs=tuple(specs), out_specs=(projections, cache_specs), check_vma=False)
    return mapped(*arrays)
