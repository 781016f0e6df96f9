"""Decoding: the `Transformer` of training, one token at a time, through a cache.

A layer's cache holds keys, values, and F as one vector f for all heads: a query attends with f, then adds its own
choices to f, for all later queries. `Block` takes attention as an argument; here the layer's cache is what attends. Any
other `LayerCache` decodes through the same functions, with as many slots in each layer as it likes.

Shape letters: the package's; M slots of a cache.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ..attention import attend_whole, implementation_module
from ..quantised import check_cache_dtype, is_int8, quantise, selecting_dtype
from ..selection import Projections, Rule, Seen, Selection
from ..slots import Slots, heads_as_slots, scale_shape, scales_as_slots, slots_shape, take_in
from .config import TransformerConfig
from .transformer import Attend, Block, Transformer


class LayerCache(Protocol):
    """What one layer remembers; a pytree."""

    def attend(
        self, position_B: Array, q: Array, k: Array, v: Array, q_sel: Array | None, k_sel: Array | None
    ) -> tuple[Array, Self]:
        """Takes in the token at `position_B` int32 [B], and attends for it: (out [B, 1, H, D], the cache after it).

        The other arguments are a block's projections of this token, [B, 1, heads, D], `q_sel` and `k_sel` [B, 1, D] or
        None, where the selecting head has no projections of its own.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of decoding. Rows may be at different positions."""

    position: Array  # int32 [B], tokens taken in: the position of each row's next token
    layers: tuple[LayerCache, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullLayerCache:
    """Every token of the sequence, slot m holding position m."""

    k: Array  # [B, K, M, D], or as `slots_shape` says
    v: Array  # the same
    k_sel: Array | None  # [B, 1, M, D], only where the selecting head has its own projections
    f: Array | None  # float32 [B, M], F of the next query; None if nothing selects
    selection: Selection = dataclasses.field(metadata={"static": True})
    fused: bool = dataclasses.field(default=False, metadata={"static": True})  # decodes by the TPU kernel
    scale: Array | None = None  # of int8 keys and values, as in `Slots`

    def attend(
        self, position_B: Array, q: Array, k: Array, v: Array, q_sel: Array | None, k_sel: Array | None
    ) -> tuple[Array, "FullLayerCache"]:
        """As `LayerCache.attend`."""
        slots = Slots(self.k, self.v, self.k_sel, None, self.f, self.scale)
        new = Projections(q, k, v, q_sel, k_sel)
        out, after, _ = take_in(new, slots, position_B, position_B, self.selection, fused=self.fused)
        return out, dataclasses.replace(self, k=after.k, v=after.v, k_sel=after.k_sel, f=after.f, scale=after.scale)


def init_cache(config: TransformerConfig, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty full cache for `batch` rows of up to `length` tokens; keys and values in `dtype`, by default the
    model's, or "int8" with scales.

    Raises:
      ValueError: another dtype.
    """
    c, dtype = config, check_cache_dtype(dtype, config.dtype)
    fused, f_dtype = c.fuses_decoding(dtype), jnp.promote_types(c.dtype, jnp.float32)
    kv_shape = slots_shape(batch, c.num_kv_heads, length, c.head_dim, fused=fused, dtype=dtype)
    sel_shape = slots_shape(batch, 1, length, c.head_dim, fused=fused, dtype=dtype)
    scales = scale_shape(batch, c.num_kv_heads, length, fused=fused)

    def layer() -> FullLayerCache:  # arrays of its own, or the cache could not be donated
        return FullLayerCache(
            k=jnp.zeros(kv_shape, dtype),
            v=jnp.zeros(kv_shape, dtype),
            k_sel=jnp.zeros(sel_shape, selecting_dtype(dtype, c.dtype)) if c.selection is Selection.OWN_HEAD else None,
            f=None if c.selection is Selection.OFF else jnp.zeros((batch, length), f_dtype),
            selection=c.selection,
            fused=fused,
            scale=jnp.zeros(scales, jnp.bfloat16) if is_int8(dtype) else None,
        )

    return Cache(jnp.zeros(batch, jnp.int32), tuple(layer() for _ in range(c.num_layers)))


def decode_step(model: Transformer, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
    """Takes in one token a row: (logits [B, V] float32 of the token after it, the cache after it).

    The first token of a sequence must be <BOS>. No mesh. A full cache must have a slot left in every row: positions are
    traced, so that nothing here can check it.
    """
    position_B1 = cache.position[:, None]
    scoped = jax.named_scope("cache")  # so that profiles and the plan of decoding tell it from the projections
    attends = [scoped(functools.partial(layer.attend, cache.position)) for layer in cache.layers]
    x_B1E, layers = run_layers(model, model.embed(tokens_B[:, None], position_B1), position_B1, attends)
    return _logits(model, x_B1E)[:, 0], Cache(cache.position + 1, layers)


def prefill(
    model: Transformer, tokens_BN: Array, lengths_B: Array | None = None, *, length: int, dtype: Any = None
) -> tuple[Array, Cache]:
    """Takes in whole prompts in one parallel pass: (logits [B, V] of the token after each, a full cache after it).

    The cache has `length` slots a row; it is the same as after `decode_step` for each token. No mesh.

    Args:
      model: the transformer.
      tokens_BN: int32 [B, N], N at most `length`; each row starts with <BOS>.
      lengths_B: int32 [B], the tokens of each prompt, at least 1; what follows them in `tokens_BN` is padding.
      length: slots of the cache.
      dtype: of keys and values in the cache, as in `init_cache`.

    Raises:
      ValueError: prompts that do not fit into the cache.
    """
    c, (batch, num_tokens) = model.config, tokens_BN.shape
    if num_tokens > length:
        raise ValueError(f"prompts of {num_tokens} tokens do not fit into a cache of length {length}")
    empty = init_cache(c, batch, length, dtype)
    position_N = jnp.arange(num_tokens, dtype=jnp.int32)
    lengths_B = jnp.full(batch, num_tokens, jnp.int32) if lengths_B is None else lengths_B.astype(jnp.int32)
    segments_BN = jnp.where(position_N < lengths_B[:, None], 0, -1)  # negative: padding, which selects nothing

    layers = cast(tuple[FullLayerCache, ...], empty.layers)
    attends = [functools.partial(_attend_and_fill, c, segments_BN, layer) for layer in layers]
    x_BNE, filled = run_layers(model, model.embed(tokens_BN, position_N), position_N, attends)
    last_B1E = jnp.take_along_axis(x_BNE, (lengths_B - 1)[:, None, None], axis=1)
    return _logits(model, last_B1E)[:, 0], Cache(lengths_B, filled)


def _attend_and_fill(
    config: TransformerConfig,
    segments_BN: Array,
    empty: FullLayerCache,
    q: Array,
    k: Array,
    v: Array,
    *selecting: Array | None,
) -> tuple[Array, FullLayerCache]:
    """Attention of whole prompts to themselves, and a layer's cache after it."""
    scale = None
    if empty.scale is not None:
        (k_held, k_scale), (v_held, v_scale) = held = quantise(k), quantise(v)
        scale = scales_as_slots(k_scale, v_scale, empty.scale, fused=empty.fused)
        k, v = (x.floats(q.dtype) for x in held)  # as every later query will see them
    else:
        k_held, v_held = k, v
    projections, seen = Projections(q, k, v, *selecting), Seen.whole(segments_BN)
    rule, num_tokens, f = Rule(config.head_dim**-0.5, config.selection), q.shape[1], empty.f
    out, _ = attend_whole(projections, seen, rule, config.attention)
    if f is not None:
        sums_BN = implementation_module(config.attention).column_sums(*projections.selecting(), seen, rule)
        f = f.at[:, :num_tokens].set(sums_BN)
    k_sel = projections.k_sel
    as_slots = functools.partial(heads_as_slots, fused=empty.fused)
    filled = dataclasses.replace(
        empty,
        k=as_slots(k_held, empty.k),
        v=as_slots(v_held, empty.v),
        k_sel=None if empty.k_sel is None or k_sel is None else as_slots(k_sel[:, :, None], empty.k_sel),
        f=f,
        scale=scale,
    )
    return out, filled


def run_layers(
    model: Transformer, x_BNE: Array, position: Array, attends: Sequence[Attend]
) -> tuple[Array, tuple[Any, ...]]:
    """The blocks one after the other, each with its own attention: (x after the last, what each attention adds).

    Not scanned, since caches may differ in shape from layer to layer and are updated in place this way.
    `position` is int32 [N] or [B, N].
    """
    extras = []
    for block, attend in zip(layers_of(model), attends, strict=True):
        x_BNE, extra = block(x_BNE, position, attend)
        extras.append(extra)
    return x_BNE, tuple(extras)


def for_decoding(model: Transformer) -> Transformer:
    """The model as `decode_step` and `prefill` want it, and nothing else: they compute the same bits from it, sooner.

    Each layer has arrays of its own: of stacked ones, XLA's CPU backend copies every layer's slice at every step, which
    costs more than the step. Weights are kept in the dtype in which they are multiplied, the config's, with the MLP's
    norm multiplied in, so that bfloat16 reads half as much.
    """
    dtype = model.config.dtype
    alone = nnx.merge(*nnx.split(model))
    layers = layers_of(alone)
    for block in layers:
        scale_E1 = block.mlp_norm[...][:, None]
        block.w_gate[...] *= scale_E1
        block.w_up[...] *= scale_E1
        block.mlp_norm[...] = jnp.ones_like(block.mlp_norm[...])
    alone.blocks = nnx.List([_in_dtype(block, dtype) for block in layers])  # type: ignore[assignment]
    # Learned positions are added to embeddings before both are rounded.
    return alone if model.config.positions == "learned" else _in_dtype(alone, dtype)


def _in_dtype(module: Any, dtype: Any) -> Any:
    """The module with its matrices in `dtype`; norms' scales stay as they are."""
    graph, parameters = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, parameters))


def layers_of(model: Transformer) -> Sequence[Block]:
    if isinstance(model.blocks, nnx.List):
        return model.blocks
    return unstacked(model.blocks, model.config.num_layers)


def unstacked(stacked: Any, num_layers: int) -> list[Any]:
    """The modules whose parameters have been stacked along a leading L."""
    graph, parameters = nnx.split(stacked)
    return [nnx.merge(graph, jax.tree.map(lambda p, n=n: p[n], parameters)) for n in range(num_layers)]


def _logits(model: Transformer, x_BNE: Array) -> Array:
    return model.logits(model.normalised(x_BNE))
