"""Taking whole prompts into a pruned cache, in one parallel pass or block by block.

Shape letters: README.md.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from selective_attention import Cache, Transformer, reshard
from selective_attention.transformer.decoding import run_layers

from .budgets import Budgets, BudgetsError
from .cache import PrunedLayerCache, init_pruned_cache
from .policies import EvictionPolicy


def prefill(
    model: Transformer,
    tokens_BN: Array,
    lengths_B: Array | None = None,
    *,
    budgets: Budgets,
    policy: EvictionPolicy,
    dtype: Any = None,
    block: int | None = None,
) -> tuple[Array, Cache]:
    """Takes in prompts of different lengths: (logits [B, V] of the token after each, the pruned cache after it).

    The cache holds what `decode_step` for each token would have left in it.

    Args:
      model: the transformer.
      tokens_BN: int32 [B, N]; each row starts with <BOS>. Prompts may be longer than the budgets.
      lengths_B: int32 [B], the tokens of each prompt, at least 1; what follows them in `tokens_BN` is padding.
      budgets, policy: how many tokens each layer may hold, and who leaves a full one.
      dtype: of keys and values in the cache; by default the model's.
      block: T, tokens taken in at a time, by default all. At once, a layer's keys and values of the whole prompt are
        in memory while it is computed; in blocks, those of M + T tokens with M the layer's budget, and attention costs
        N (M + T), not N^2 / 2. Blocks without a token of any prompt are not computed.

    Raises:
      BudgetsError: as `init_pruned_cache`, or a block below 1.
    """
    batch, num_tokens = tokens_BN.shape
    lengths_B = jnp.full(batch, num_tokens, jnp.int32) if lengths_B is None else jnp.asarray(lengths_B, jnp.int32)
    lengths_B = reshard(lengths_B, "batch")
    cache = init_pruned_cache(model.config, batch, budgets, policy, dtype)
    block = num_tokens if block is None else min(check_block(block), num_tokens)
    tokens_BN = reshard(jnp.pad(tokens_BN, ((0, 0), (0, -num_tokens % block))), "batch", None)
    _, last_BE, cache = take_block(model, cache, tokens_BN[:, :block], lengths_B, empty=True)
    if tokens_BN.shape[1] > block:

        def step(n, carry):
            last_BE, cache = carry
            goes_on_B = lengths_B > cache.position
            tokens_BT = jax.lax.dynamic_slice_in_dim(tokens_BN, n * block, block, axis=1)
            _, in_block_BE, cache = take_block(model, cache, tokens_BT, lengths_B, empty=False)
            return jnp.where(goes_on_B[:, None], in_block_BE, last_BE), cache

        # As many blocks as the longest prompt has: how far it is padded costs nothing.
        last_BE, cache = jax.lax.fori_loop(1, -(-jnp.max(lengths_B) // block), step, (last_BE, cache))
    return logits_of_last(model, last_BE), cache


def logits_of_last(model: Transformer, last_BE: Array) -> Array:
    """Logits [B, V] of the tokens after these, from the last layer's output."""
    normed_B1E = model.normalised(last_BE)[:, None]
    return model.logits(normed_B1E)[:, 0]


def check_block(block: int) -> int:
    """`block` itself, or a BudgetsError."""
    if block < 1:
        raise BudgetsError(f"block must be at least 1, got {block}")
    return block


def take_block(
    model: Transformer, cache: Cache, tokens_BT: Array, lengths_B: Array, *, empty: bool
) -> tuple[Array, Array, Cache]:
    """(the last layer's output [B, T, E], the same [B, E] at each row's last token of the block, the cache after it).

    `lengths_B` are the tokens of each row's whole prompt; `empty` says that the cache is.
    """
    length = tokens_BT.shape[1]
    count_B = jnp.clip(lengths_B - cache.position, 0, length)
    # Padding may go beyond the model's positions, where a table of learned ones has nothing.
    last = model.config.max_length - 1
    position_BT = jnp.minimum(cache.position[:, None] + jnp.arange(length, dtype=jnp.int32), last)
    layers = cast(tuple[PrunedLayerCache, ...], cache.layers)
    attends = [functools.partial(layer.take_in, cache.position, count_B, empty=empty) for layer in layers]
    x_BTE, after = run_layers(model, model.embed(tokens_BT, position_BT), position_BT, attends)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    last_BE = jnp.take_along_axis(x_BTE, last_B11, axis=1)[:, 0]
    return x_BTE, last_BE, Cache(cache.position + count_B, after)
