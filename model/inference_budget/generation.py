"""Continuing prompts with a pruned cache.

Shape letters: B batch, N positions, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from selective_attention import Transformer
from selective_attention.transformer.decoding import check_sampling, decode_step, draw, unstacked

from .budgets import Budgets
from .policies import EvictionPolicy
from .prefill import prefill

CHUNK = 16  # tokens drawn between two looks at what has come out


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    budgets: Budgets,
    policy: EvictionPolicy,
    num_tokens: int,
    *,
    key: Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    dtype: Any = None,
    block: int | None = None,
    on_tokens: Callable[[list[list[int]]], object] | None = None,
) -> list[list[int]]:
    """Continuations, each up to and without its first stop id, at most `num_tokens` long.

    Args:
      model: the transformer; under a mesh, with its parameters on it.
      prompts: token ids, each starting with <BOS>; they may differ in length and be longer than the budgets.
      budgets, policy: slots of each layer, and who leaves a full one.
      num_tokens: tokens to draw, with the longest prompt at most the model's `max_length`.
      key: of `jax.random`, by default that of seed 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k, top_p: draw only from the k likeliest tokens, and only from the fewest that have a probability of p.
      stop_ids: tokens that end a continuation.
      dtype: of keys and values in the cache, such as "bfloat16"; by default the model's.
      block: as in `prefill`.
      on_tokens: called with each prompt's next tokens as they come out, some at a time.

    Raises:
      ValueError: an empty prompt, too many tokens, or sampling options out of range.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; it needs at least <BOS>")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest:
        raise ValueError("there is no prompt")
    check_sampling(model.config, longest, num_tokens, temperature, top_k, top_p)
    tokens_BN = np.zeros((len(prompts), longest), np.int32)
    for row_N, prompt in zip(tokens_BN, prompts, strict=True):
        row_N[: len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    graph, parameters = nnx.split(_unstacked(model))
    logits_BV, cache = _prefill(
        graph, parameters, tokens_BN, lengths_B, budgets=budgets, policy=policy, dtype=dtype, block=block
    )
    chunk = min(CHUNK, num_tokens) if stop_ids or on_tokens else num_tokens
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, -(-num_tokens // chunk) * chunk).reshape(-1, chunk)
    outputs: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for chunk_keys in keys:
        tokens_NB, logits_BV, cache = decode(
            graph, parameters, logits_BV, cache, chunk_keys, temperature, top_p or 1.0, top_k=top_k, nucleus=bool(top_p)
        )
        new: list[list[int]] = [[] for _ in prompts]
        for row, tokens_N in enumerate(np.asarray(tokens_NB).T):
            for token in tokens_N.tolist():
                going[row] = going[row] and token not in stop_ids and len(outputs[row]) < num_tokens
                if going[row]:
                    outputs[row].append(token)
                    new[row].append(token)
        if on_tokens is not None:
            on_tokens(new)
        if not any(going):
            break
    return outputs


_unstacked = jax.jit(unstacked)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("budgets", "policy", "dtype", "block"))
def _prefill(graph, parameters, tokens_BN, lengths_B, **options):
    return prefill(nnx.merge(graph, parameters), tokens_BN, lengths_B, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top_k", "nucleus"), donate_argnums=(2, 3))
def decode(graph, parameters, logits_BV, cache, keys, temperature, top_p, *, top_k: int | None, nucleus: bool):
    """Draws and takes in one token a key: (tokens [keys, B], the next logits, the cache)."""
    model = nnx.merge(graph, parameters)

    def step(carry, key):
        logits_BV, cache = carry
        tokens_B = draw(logits_BV, key, temperature, top_k, top_p if nucleus else None)
        return decode_step(model, cache, tokens_B), tokens_B

    (logits_BV, cache), tokens_NB = jax.lax.scan(step, (logits_BV, cache), keys)
    return tokens_NB, logits_BV, cache
