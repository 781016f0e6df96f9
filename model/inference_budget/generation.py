"""Continuing prompts with a pruned cache.

Shape letters: README.md; C tokens of a chunk.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from selective_attention import Cache, Transformer, TransformerConfig, reshard
from selective_attention.quantised import check_cache_dtype
from selective_attention.transformer.decoding import decode_step, for_decoding
from selective_attention.transformer.sampling import check_sampling, draw

from .budgets import Budgets, BudgetsError, check_budgets
from .policies import EvictionPolicy, policy_for
from .prefill import check_block, prefill

CHUNK = 16  # tokens drawn between two looks at what has come out
BLOCK = 256  # tokens of a prompt that are taken in at a time
ROWS = 32  # up to which the rows of a batch are a power of two; above, a multiple of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    temperature: Array | float = 1.0  # divides the logits; 0 takes the likeliest token
    top_p: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})


class Drawing(TypedDict, total=False):
    """Options of `Decoder.generate`."""

    key: Array | None  # of `jax.random`, by default that of seed 0
    temperature: float  # divides the logits, by default 1; 0 takes the likeliest token
    top_k: int | None  # draw only from so many likeliest tokens
    top_p: float | None  # draw only from the fewest that have this probability together
    stop_ids: Sequence[int]  # tokens that end a continuation
    on_tokens: Callable[[list[list[int]]], object] | None  # called with each prompt's next tokens; True ends it all


class Decoder:
    """A model made ready to continue prompts under budgets.

    It holds the weights once, laid out for decoding; the model that it was made from may be dropped. It compiles few
    programs: prompts are padded to one of three lengths, batches to 1, 2, 4, 8, 16 or a multiple of 32 rows, and the
    number of tokens that are drawn is no shape. Padding changes no token.

    Args:
      model: the transformer; under a mesh, with its parameters on it.
      budgets, policy: how many tokens each layer may hold, and who leaves a full one.
      cache_dtype: of keys and values in the cache: "float32", "bfloat16", or "int8" with a scale for each token and
        head; by default the model's.
      block: as in `prefill`; longer prompts are taken in so many tokens at a time.
      bos_id: the id of <BOS>, which prompts are then checked to start with.

    Attributes:
      graph, parameters: the model, with each layer's weights apart, as `nnx.split` gives it.

    Raises:
      BudgetsError: budgets or a policy that do not fit the model, or a block below 1.
      ValueError: a dtype that a cache cannot have.
    """

    def __init__(
        self,
        model: Transformer,
        budgets: Budgets,
        policy: EvictionPolicy,
        *,
        cache_dtype: Any = None,
        block: int | None = None,
        bos_id: int | None = None,
    ) -> None:
        check_budgets(budgets, model.config)
        self.config, self.budgets, self.policy = model.config, budgets, policy_for(policy, model)
        self._block = BLOCK if block is None else check_block(block)
        self.cache_dtype, self._bos_id = check_cache_dtype(cache_dtype, model.config.dtype), bos_id
        self.graph, self.parameters = nnx.split(_for_decoding(model))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        key: Array | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Sequence[int] = (),
        on_tokens: Callable[[list[list[int]]], object] | None = None,
    ) -> list[list[int]]:
        """Continues each prompt, up to and without its first stop id, by at most `num_tokens` tokens.

        Args:
          prompts: token ids, each starting with <BOS>; they may differ in length and be longer than the budgets.
          num_tokens: tokens to draw, with the longest prompt at most the model's `max_length`.
          key, temperature, top_k, top_p, stop_ids, on_tokens: as in `Drawing`.

        Raises:
          BudgetsError: a prompt that the model cannot take.
          SamplingError: too many tokens, or sampling options out of range.
        """
        check_prompts(prompts, self.config, self._bos_id)
        check_sampling(self.config, max(map(len, prompts)), num_tokens, temperature, top_k, top_p)
        key = jax.random.key(0) if key is None else key
        chunks = self._chunks(prompts, num_tokens, key, Sampling(temperature, top_p, top_k))
        if not (stop_ids or on_tokens):
            chunks = iter(list(chunks))  # nobody looks at what has come out: the device need not wait for a look
        outputs = _Outputs(len(prompts), frozenset(stop_ids))
        for tokens_CB, count in chunks:
            new = outputs.add(np.asarray(tokens_CB)[:count, : len(prompts)])
            enough = on_tokens is not None and on_tokens(new) is True
            if enough or not any(outputs.going):
                break
        return outputs.tokens

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Array, Cache]:
        """Takes in prompts: (logits [B, V] of the token after each, the cache), B the rows of the padded batch.

        The first rows are the prompts, in their order; the others hold one token each, to no end.
        """
        tokens_BN, lengths_B = self._padded(prompts)
        options = {"budgets": self.budgets, "policy": self.policy, "dtype": self.cache_dtype, "block": self._block}
        return _prefill(self.graph, self.parameters, tokens_BN, lengths_B, **options)

    def _chunks(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, key: Array, sampling: Sampling
    ) -> Iterator[tuple[Array, int]]:
        """Tokens [C, B] as they are drawn, and how many of the C there are."""
        logits_BV, cache = self.prefill(prompts)
        for start in range(0, num_tokens, CHUNK):
            count = min(CHUNK, num_tokens - start)
            tokens_CB, logits_BV, cache = decode(
                self.graph, self.parameters, logits_BV, cache, key, start, count, sampling
            )
            yield tokens_CB, count

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The prompts as int32 [B, N], with zeros after each, and their lengths as int32 [B]."""
        most, longest = self.config.max_length, max(map(len, prompts))
        widths = min(-(-self._block // 4), most), min(self._block, most), most
        width = next(width for width in widths if longest <= width)
        rows = len(prompts)
        batch = 1 << (rows - 1).bit_length() if rows <= ROWS else -(-rows // ROWS) * ROWS
        tokens_BN, lengths_B = np.zeros((batch, width), np.int32), np.ones(batch, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BN[row, : len(prompt)], lengths_B[row] = prompt, len(prompt)
        return tokens_BN, lengths_B


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    budgets: Budgets,
    policy: EvictionPolicy,
    num_tokens: int,
    *,
    cache_dtype: Any = None,
    block: int | None = None,
    bos_id: int | None = None,
    **options: Unpack[Drawing],
) -> list[list[int]]:
    """Continues prompts once, as `Decoder.generate` does; for more than one call make a `Decoder`, which copies the
    weights only once.

    Args:
      model, budgets, policy, cache_dtype, block, bos_id: as in `Decoder`.
      prompts, num_tokens, options: as in `Decoder.generate`.

    Raises:
      BudgetsError, SamplingError: as both.
    """
    decoder = Decoder(model, budgets, policy, cache_dtype=cache_dtype, block=block, bos_id=bos_id)
    return decoder.generate(prompts, num_tokens, **options)


def check_prompts(prompts: Sequence[Sequence[int]], config: TransformerConfig, bos_id: int | None) -> None:
    """Raises BudgetsError for the first prompt that the model cannot take."""
    if not len(prompts):
        raise BudgetsError("there is no prompt; give at least one list of token ids")
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, config, bos_id, f"prompt {number}")
        bos_id = prompt[0] if bos_id is None else bos_id  # unknown, but one for all


def check_prompt(prompt: Sequence[int], config: TransformerConfig, bos_id: int | None, name: str) -> None:
    """Raises BudgetsError, which calls the prompt by its name, if the model cannot take it."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise BudgetsError(f"{name} is {prompt!r}, not a list of token ids; one prompt alone is a list of one list")
    if not ids.size:
        raise BudgetsError(f"{name} is empty; it needs at least <BOS>")
    outside = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
    if outside.size:
        raise BudgetsError(
            f"{name} has token {ids[outside[0]]} at position {outside[0]}; the model's are from 0 to "
            f"{config.vocab_size - 1}"
        )
    if bos_id is not None and ids[0] != bos_id:
        raise BudgetsError(f"{name} starts with token {ids[0]}; put <BOS>, which is {bos_id}, before it")


class _Outputs:
    """Continuations as they come out, each until its first stop id."""

    def __init__(self, batch: int, stop_ids: frozenset[int]) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.going = [True] * batch
        self._stop_ids = stop_ids

    def add(self, tokens_CB: np.ndarray) -> list[list[int]]:
        """Takes in C tokens a row; what of them belongs to each continuation."""
        new: list[list[int]] = [[] for _ in self.tokens]
        for row, tokens_C in enumerate(tokens_CB.T):
            for token in tokens_C.tolist():
                self.going[row] &= token not in self._stop_ids
                if self.going[row]:
                    self.tokens[row].append(token)
                    new[row].append(token)
        return new


_for_decoding = jax.jit(for_decoding)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("budgets", "policy", "dtype", "block"))
def _prefill(graph, parameters, tokens_BN, lengths_B, **options):
    return prefill(nnx.merge(graph, parameters), tokens_BN, lengths_B, **options)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def decode(graph, parameters, logits_BV, cache, key, start, count, sampling: Sampling):
    """Draws and takes in `count` tokens of at most CHUNK, the first of them the `start`-th of its sequence.

    Returns the tokens [C, B], of which only `count` are drawn, the next logits and the cache. Neither number is part of
    the program.
    """
    model = nnx.merge(graph, parameters)
    top_p = None if sampling.top_p is None else jnp.asarray(sampling.top_p)

    def step(n, carry):
        tokens_CB, logits_BV, cache = carry
        key_n = jax.random.fold_in(key, start + n)
        tokens_B = draw(logits_BV, key_n, sampling.temperature, sampling.top_k, top_p)
        tokens_CB = jax.lax.dynamic_update_index_in_dim(tokens_CB, tokens_B, n, axis=0)
        return tokens_CB, *decode_step(model, cache, tokens_B)

    tokens_CB = reshard(jnp.zeros((CHUNK, logits_BV.shape[0]), jnp.int32), None, "batch")
    return jax.lax.fori_loop(0, count, step, (tokens_CB, logits_BV, cache))
