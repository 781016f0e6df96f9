"""Rows that decode together, each for a request of its own: the engine's programs.

What a row draws depends on its own logits, its request's seed and how many tokens it has drawn, and on nothing that
other rows hold: where a branch is taken for the sake of one row, the others' values pass it unchanged.

Shape letters: README.md; C steps of a round, A likeliest tokens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from selective_attention import Cache, TransformerConfig, partition_spec, reshard
from selective_attention.transformer.decoding import decode_step

from .budgets import Budgets
from .cache import init_pruned_cache
from .policies import EvictionPolicy
from .prefill import logits_of_last, take_block
from .requests import MAX_LOGPROBS, GenerationRequest

NOTHING = -1  # in place of a token, where a row draws none


class Asked(NamedTuple):
    """What each row's request asks for, and how far it is."""

    left: Array  # int32 [B], tokens still to draw; 0 if the row is free
    drawn: Array  # int32 [B]
    seed: Array  # uint32 [B, 2]
    temperature: Array  # float32 [B]
    top_k: Array  # int32 [B], at most V
    top_p: Array  # float32 [B], at most 1
    stops: Array  # bool [B, V]
    scored: Array  # bool [B], whether it wants log-probabilities


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of B rows; a free row holds anything."""

    cache: Cache
    logits: Array  # float32 [B, V], of each row's next token
    asked: Asked


class Scores(NamedTuple):
    """Of tokens [...]: log-probabilities, nats."""

    logprob: Array  # float32 [...]
    likeliest: Array  # int32 [..., A]
    likeliest_logprob: Array  # float32 [..., A]


class Drawn(NamedTuple):
    """What came out of a round; of the C steps only as many as were taken."""

    tokens: Array  # int32 [C, B], NOTHING where a row drew none
    logprob: Array  # float32 [C, B], where a row asked for it
    likeliest: Array  # int32 [C, B, A], where a row asked for it
    likeliest_logprob: Array  # float32 [C, B, A]


def asked_of(request: GenerationRequest, vocab_size: int) -> Asked:
    """The request as a row of its own, B = 1."""
    stops_V = np.zeros(vocab_size, bool)
    stops_V[list(request.stop_ids)] = True
    row: dict[str, Any] = {
        "left": np.int32(request.num_tokens),
        "drawn": np.int32(0),
        "seed": np.random.SeedSequence(request.seed).generate_state(2),
        "temperature": np.float32(request.temperature),
        "top_k": np.int32(request.top_k or vocab_size),
        "top_p": np.float32(1 if request.top_p is None else request.top_p),
        "stops": stops_V,
        "scored": np.bool_(request.logprobs is not None),
    }
    return Asked(**{name: value[None] for name, value in row.items()})


def free_rows(
    config: TransformerConfig, rows: int, budgets: Budgets, policy: EvictionPolicy, dtype: Any = None
) -> Rows:
    """Rows without a request; keys and values as in `init_pruned_cache`."""
    nothing = jax.tree.map(np.zeros_like, asked_of(GenerationRequest((), 0), config.vocab_size))

    def zeros(like: np.ndarray) -> Array:
        shape = (rows, *like.shape[1:])
        axes = ("batch", *(None,) * (like.ndim - 1))
        return jnp.zeros(shape, like.dtype, out_sharding=partition_spec(axes, shape))

    logits_BV = jnp.zeros((rows, config.vocab_size), jnp.promote_types(config.dtype, jnp.float32))
    cache = init_pruned_cache(config, rows, budgets, policy, dtype)
    return Rows(cache, reshard(logits_BV, "batch", "vocab"), jax.tree.map(zeros, nothing))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames=("budgets", "policy", "dtype"))
def take_chunk(
    graph, parameters, lane: Cache | None, tokens_1T, length_1, next_1T, scored, *, budgets, policy, dtype
) -> tuple[Array, Cache, Scores]:
    """Takes in the next T tokens of a prompt: (logits [1, V] of the token after it, the cache, scores).

    Args:
      graph, parameters: the model.
      lane: what holds the tokens before them, None if they are the first; donated.
      tokens_1T: the tokens; what follows the prompt's end is padding.
      length_1: tokens of the whole prompt, of a first chunk's at most T.
      next_1T: the token after each of them, whose scores are given.
      scored: bool, whether they are wanted; else they are zeros.
    """
    model, empty = nnx.merge(graph, parameters), lane is None
    if lane is None:
        lane = init_pruned_cache(model.config, 1, budgets, policy, dtype)
    tokens_1T, length_1 = reshard(tokens_1T, "batch", None), reshard(length_1, "batch")
    x_1TE, last_1E, lane = take_block(model, lane, tokens_1T, length_1, empty=empty)
    logits_1V = logits_of_last(model, last_1E)
    top = min(MAX_LOGPROBS, logits_1V.shape[1])

    def scores() -> Scores:
        logits_1TV = reshard(model.logits(model.normalised(x_1TE)), "batch", None, None)
        return _scores(logits_1TV.astype(logits_1V.dtype), reshard(next_1T, "batch", None), top)

    nothing = jax.tree.map(lambda x: jnp.zeros_like(x), jax.eval_shape(scores))
    return logits_1V, lane, jax.lax.cond(scored, scores, lambda: nothing)


@functools.partial(jax.jit, donate_argnums=0)
def admit(rows: Rows, row: Array, logits_1V: Array, lane: Cache, asked: Asked) -> Rows:
    """The rows with one of them replaced, all of it, by a prompt that was taken in."""

    def put(x: Array, new: Array) -> Array:
        new = new.astype(x.dtype)
        if jax.sharding.get_abstract_mesh().empty:
            return jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0)
        spec = jax.typeof(x).sharding.spec
        whole = P(None, *spec[1:])
        replace = functools.partial(_replace_on_shard, batch_axes=spec[0])
        mapped = jax.shard_map(replace, in_specs=(spec, whole, P()), out_specs=spec, check_vma=False)
        return mapped(x, jax.reshard(new, whole), row)

    return jax.tree.map(put, rows, Rows(lane, logits_1V, asked))


def _replace_on_shard(x: Array, new: Array, row: Array, *, batch_axes: Any) -> Array:
    """Replaces one of all shards' rows, if this shard has it."""
    row = row - (0 if batch_axes is None else jax.lax.axis_index(batch_axes) * x.shape[0])
    held = jax.lax.dynamic_slice_in_dim(x, row, 1)  # of another row, if it is not here
    new = jnp.where((row >= 0) & (row < x.shape[0]), new, held)
    return jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps", donate_argnums=2)
def decode_rows(graph, parameters, rows: Rows, going_B, hurry, *, steps: int) -> tuple[Rows, Drawn]:
    """Draws and takes in up to `steps` tokens in each row that goes on.

    Args:
      graph, parameters: the model.
      rows: the state; donated.
      going_B: bool, which rows are not to be freed before.
      hurry: bool, whether to come back when the first row is free.
      steps: at most.
    """
    model, batch = nnx.merge(graph, parameters), rows.logits.shape[0]
    top = min(MAX_LOGPROBS, rows.logits.shape[1])

    def goes_on(carry):
        n, freed, rows, _ = carry
        return (n < steps) & jnp.any(rows.asked.left > 0) & ~(hurry & freed)

    def step(carry):
        n, freed, rows, drawn = carry
        asked = rows.asked
        going_B = asked.left > 0
        logits_BV = reshard(rows.logits, "batch", None)
        tokens_B = draw(logits_BV, asked)
        scores = jax.lax.cond(
            jnp.any(asked.scored & going_B),
            lambda: _scores(logits_BV, tokens_B, top),
            lambda: jax.tree.map(lambda x: jnp.zeros_like(x[0]), Scores(*drawn[1:])),
        )
        is_token_BV = jnp.arange(logits_BV.shape[1]) == tokens_B[:, None]
        stopped_B = jnp.any(asked.stops & is_token_BV, axis=-1)
        left_B = jnp.where(going_B & ~stopped_B, asked.left - 1, 0)
        one = Drawn(jnp.where(going_B, tokens_B, NOTHING), *scores)
        drawn = jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, n, axis=0), drawn, one)
        next_BV, cache = decode_step(model, rows.cache, tokens_B)
        # A free row stays where it is, and so within the model's positions.
        cache = Cache(jnp.where(going_B, cache.position, rows.cache.position), cache.layers)
        asked = asked._replace(left=left_B, drawn=asked.drawn + 1)
        return n + 1, freed | jnp.any(going_B & (left_B == 0)), Rows(cache, next_BV, asked), drawn

    def zeros(*shape: int, dtype: Any) -> Array:
        return reshard(jnp.zeros((steps, batch, *shape), dtype), None, "batch", *(None,) * len(shape))

    float_dtype = rows.logits.dtype
    drawn = Drawn(
        zeros(dtype=jnp.int32) + NOTHING,
        zeros(dtype=float_dtype),
        zeros(top, dtype=jnp.int32),
        zeros(top, dtype=float_dtype),
    )
    left_B = jnp.where(reshard(going_B, "batch"), rows.asked.left, 0)
    rows = Rows(rows.cache, rows.logits, rows.asked._replace(left=left_B))
    _, _, rows, drawn = jax.lax.while_loop(goes_on, step, (jnp.int32(0), jnp.bool_(False), rows, drawn))
    return rows, drawn


def draw(logits_BV: Array, asked: Asked) -> Array:
    """The next token of each row, int32 [B]: as `selective_attention.transformer.sampling.draw`, each row by its own
    options and with random numbers of its own.
    """
    drawing_B = (asked.left > 0) & (asked.temperature > 0)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def sampled() -> Array:
        warm_B1 = jnp.where(asked.temperature > 0, asked.temperature, 1)[:, None]
        warm_BV = logits_BV / warm_B1
        cut_B = drawing_B & ((asked.top_k < logits_BV.shape[1]) | (asked.top_p < 1))
        warm_BV = jax.lax.cond(jnp.any(cut_B), lambda: _cut(warm_BV, asked), lambda: warm_BV)
        tokens_B = jax.vmap(_draw_one)(asked.seed, asked.drawn, warm_BV)
        return jnp.where(asked.temperature > 0, tokens_B, greedy_B).astype(jnp.int32)

    return jax.lax.cond(jnp.any(drawing_B), sampled, lambda: greedy_B)


def _draw_one(seed: Array, number: Array, logits_V: Array) -> Array:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.categorical(jax.random.fold_in(key, number), logits_V)


def _cut(logits_BV: Array, asked: Asked) -> Array:
    """The logits with -inf for what a row's top_k and top_p leave out."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    least_B1 = jnp.take_along_axis(sorted_BV, asked.top_k[:, None] - 1, axis=-1)
    sorted_BV = jnp.where(sorted_BV < least_B1, -jnp.inf, sorted_BV)
    p_BV = jax.nn.softmax(sorted_BV)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    nucleus_B1 = jnp.min(jnp.where(before_BV < asked.top_p[:, None], sorted_BV, jnp.inf), axis=-1, keepdims=True)
    least_B1 = jnp.where(asked.top_p[:, None] < 1, jnp.maximum(least_B1, nucleus_B1), least_B1)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _scores(logits: Array, tokens: Array, top: int) -> Scores:
    """Of tokens [...] by logits [..., V]."""
    log = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(log, tokens[..., None], axis=-1)[..., 0]
    likeliest_logprob, likeliest = jax.lax.top_k(log, top)
    return Scores(logprob, likeliest.astype(jnp.int32), likeliest_logprob)
