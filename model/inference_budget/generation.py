"""Continuing prompts with a pruned cache.

Shape letters: README.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from selective_attention import Transformer
from selective_attention.transformer.decoding import decode_step, unstacked
from selective_attention.transformer.sampling import check_sampling, draw

from .budgets import Budgets
from .policies import EvictionPolicy
from .prefill import prefill

CHUNK = 16  # tokens drawn between two looks at what has come out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    temperature: Array | float = 1.0  # divides the logits; 0 takes the likeliest token
    top_p: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})


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
    """Continues each prompt, up to and without its first stop id, by at most `num_tokens` tokens.

    Args:
      model: the transformer; under a mesh, with its parameters on it.
      prompts: token ids, each starting with <BOS>; they may differ in length and be longer than the budgets.
      budgets, policy: how many tokens each layer may hold, and who leaves a full one.
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
    tokens_BN, lengths_B = _padded(prompts)
    check_sampling(model.config, tokens_BN.shape[1], num_tokens, temperature, top_k, top_p)
    graph, parameters = nnx.split(_unstacked(model))
    logits_BV, cache = _prefill(
        graph, parameters, tokens_BN, lengths_B, budgets=budgets, policy=policy, dtype=dtype, block=block
    )
    chunk = min(CHUNK, num_tokens) if stop_ids or on_tokens else num_tokens
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, -(-num_tokens // chunk) * chunk).reshape(-1, chunk)
    outputs = _Outputs(len(prompts), num_tokens, frozenset(stop_ids))
    for chunk_keys in keys:
        sampling = Sampling(temperature, top_p, top_k)
        tokens_NB, logits_BV, cache = decode(graph, parameters, logits_BV, cache, chunk_keys, sampling)
        new = outputs.add(np.asarray(tokens_NB))
        if on_tokens is not None:
            on_tokens(new)
        if not any(outputs.going):
            break
    return outputs.tokens


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as int32 [B, N], with zeros after each, and their lengths as int32 [B]."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; it needs at least <BOS>")
    if not prompts:
        raise ValueError("there is no prompt")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BN = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row_N, prompt in zip(tokens_BN, prompts, strict=True):
        row_N[: len(prompt)] = prompt
    return tokens_BN, lengths_B


class _Outputs:
    """Continuations as they come out, each until its first stop id."""

    def __init__(self, batch: int, most: int, stop_ids: frozenset[int]) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.going = [True] * batch
        self._most, self._stop_ids = most, stop_ids

    def add(self, tokens_NB: np.ndarray) -> list[list[int]]:
        """Takes in N tokens a row; what of them belongs to each continuation."""
        new: list[list[int]] = [[] for _ in self.tokens]
        for row, tokens_N in enumerate(tokens_NB.T):
            for token in tokens_N.tolist():
                self.going[row] &= token not in self._stop_ids and len(self.tokens[row]) < self._most
                if self.going[row]:
                    self.tokens[row].append(token)
                    new[row].append(token)
        return new


_unstacked = jax.jit(unstacked)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("budgets", "policy", "dtype", "block"))
def _prefill(graph, parameters, tokens_BN, lengths_B, **options):
    return prefill(nnx.merge(graph, parameters), tokens_BN, lengths_B, **options)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def decode(graph, parameters, logits_BV, cache, keys, sampling: Sampling):
    """Draws and takes in one token for each key: (tokens [keys, B], the next logits, the cache)."""
    model = nnx.merge(graph, parameters)
    top_p = None if sampling.top_p is None else jnp.asarray(sampling.top_p)

    def step(carry, key):
        logits_BV, cache = carry
        tokens_B = draw(logits_BV, key, sampling.temperature, sampling.top_k, top_p)
        return decode_step(model, cache, tokens_B), tokens_B

    (logits_BV, cache), tokens_NB = jax.lax.scan(step, (logits_BV, cache), keys)
    return tokens_NB, logits_BV, cache
