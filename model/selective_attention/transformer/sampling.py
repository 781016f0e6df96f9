"""Drawing tokens from a model, one after the other."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .config import TransformerConfig
from .decoding import decode_step, for_decoding, prefill
from .transformer import Transformer


class SamplingError(ValueError):
    """What cannot be drawn, such as more tokens than the context leaves; the message says why."""


def sample(
    model: Transformer,
    prompt_BN: Array,
    num_tokens: int,
    *,
    key: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    lengths_B: Array | None = None,
) -> Array:
    """Continues prompts: int32 [B, num_tokens], drawn from the model token by token.

    Args:
      model: the transformer. No mesh.
      prompt_BN, lengths_B: prompts as `prefill` takes them.
      num_tokens: tokens to draw; together with the prompt at most `max_length`.
      key: of `jax.random`.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: if given, draw only from so many likeliest tokens.

    Raises:
      SamplingError: a length, temperature or top_k out of range.
    """
    check_sampling(model.config, prompt_BN.shape[1], num_tokens, temperature, top_k)
    graph, parameters = nnx.split(model)
    return _sample(graph, parameters, prompt_BN, lengths_B, key, temperature, num_tokens=num_tokens, top_k=top_k)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_tokens", "top_k"))
def _sample(graph, parameters, prompt_BN, lengths_B, key, temperature, *, num_tokens: int, top_k: int | None) -> Array:
    model = for_decoding(nnx.merge(graph, parameters))

    def step(carry, key):
        logits_BV, cache = carry
        tokens_B = draw(logits_BV, key, temperature, top_k)
        return decode_step(model, cache, tokens_B), tokens_B

    keys = jax.random.split(key, num_tokens)
    start = prefill(model, prompt_BN, lengths_B, length=prompt_BN.shape[1] + num_tokens)
    (logits_BV, _), tokens_NB = jax.lax.scan(step, start, keys[:-1])  # the last token need not be taken in
    return jnp.concatenate([tokens_NB, draw(logits_BV, keys[-1], temperature, top_k)[None]]).T


def check_sampling(
    config: TransformerConfig,
    prompt_length: int,
    num_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None = None,
) -> None:
    """Raises SamplingError for what cannot be drawn."""
    left = config.max_length - prompt_length
    if left < 1:
        raise SamplingError(
            f"a prompt of {prompt_length} tokens is too long: the model was made for {config.max_length}, and at least "
            f"one is drawn; shorten it to at most {config.max_length - 1}"
        )
    if not 1 <= num_tokens <= left:
        raise SamplingError(
            f"num_tokens must be from 1 to {left}, what max_length={config.max_length} leaves after a prompt of "
            f"{prompt_length}; got {num_tokens}"
        )
    if not temperature >= 0:
        raise SamplingError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise SamplingError(f"top_k must be from 1 to vocab_size={config.vocab_size}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise SamplingError(f"top_p must be above 0 and at most 1, got {top_p}")


def draw(
    logits_BV: Array, key: Array, temperature: Array | float, top_k: int | None = None, top_p: Array | None = None
) -> Array:
    """One token a row, int32 [B]: from the `top_k` likeliest, and of these from the fewest that have a probability of
    `top_p` together. A temperature of 0 takes the likeliest.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
    if top_k is not None:
        logits_BV = jnp.where(logits_BV < jax.lax.top_k(logits_BV, top_k)[0][:, -1:], -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jnp.where(temperature > 0, jax.random.categorical(key, logits_BV), greedy_B).astype(jnp.int32)
