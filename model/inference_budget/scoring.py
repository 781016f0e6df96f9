"""How likely a model finds continuations of contexts, with a full cache or under budgets.

A context is taken in once, whatever the number of its continuations: each is then scored from a copy of the cache that
the context left. The evictions are those of feeding context and continuation token by token.

Shape letters: README.md.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from selective_attention import Transformer
from selective_attention.transformer.decoding import run_layers

from .budgets import Budgets, BudgetsError
from .cache import PrunedLayerCache
from .generation import ROWS, Decoder, check_prompts
from .perplexity import TOKENS_PER_PASS
from .policies import EvictionPolicy, OldestFirst


class Request(NamedTuple):
    """What is to be scored, as token ids."""

    context: Sequence[int]  # starts with <BOS>
    continuation: Sequence[int]


class Score(NamedTuple):
    """What a model makes of a continuation."""

    log_probability: float  # of the whole continuation after its context, nats
    greedy: bool  # whether each of its tokens is the likeliest


class Scorer:
    """A model made ready to score continuations.

    Args:
      model: the transformer, on one device.
      budgets, policy: how many tokens each layer may hold, and who leaves a full one; without them the cache is full.
      cache_dtype: as in `Decoder`.
      bos_id: the id of <BOS>, which contexts are then checked to start with.

    Attributes:
      decoder: continues prompts with the same weights and budgets.
      length: the longest context and continuation together, tokens; the last one is never fed, and not counted.
      rows: how many contexts, and continuations, a batch has at most.
      contexts, continuations: how many were taken in, and scored, so far.

    Raises:
      BudgetsError: as `Decoder`, or budgets without a policy.
    """

    def __init__(
        self,
        model: Transformer,
        budgets: Budgets | None = None,
        policy: EvictionPolicy | None = None,
        *,
        cache_dtype: Any = None,
        bos_id: int | None = None,
    ) -> None:
        if (budgets is None) != (policy is None):
            raise BudgetsError("budgets and a policy go together; give both, or neither for a full cache")
        config = model.config
        budgets = budgets or Budgets.full(config.num_layers, config.max_length)
        self.decoder = Decoder(model, budgets, policy or OldestFirst(), cache_dtype=cache_dtype, bos_id=bos_id)
        self.length, self.contexts, self.continuations = budgets.context_length, 0, 0
        self._bos_id, self.rows = bos_id, max(1, min(ROWS, TOKENS_PER_PASS // self.length))

    def score(
        self, requests: Sequence[Request], *, progress: Callable[[int], object] = lambda done: None
    ) -> list[Score]:
        """The scores, in the order of the requests; `progress` is told how many were done each time that some are.

        Raises:
          BudgetsError: a context that the model cannot take, an empty continuation, or one that does not fit.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            self._check(number, context, continuation)
            by_context.setdefault(tuple(context), []).append(number)
        contexts = sorted(by_context, key=len)
        scores: dict[int, Score] = {}
        for some in _parts(contexts, self.rows):
            # Whole batches have one shape, and the last one too if there was any before it.
            padding = [some[0][:1]] * (self.rows - len(some) if len(contexts) > self.rows else 0)
            after = self.decoder.prefill([*some, *padding])
            self.contexts += len(some)
            asked = [(row, number) for row, context in enumerate(some) for number in by_context[context]]
            asked.sort(key=lambda one: len(requests[one[1]].continuation))
            for part in _parts(asked, self.rows):
                rows, numbers = [row for row, _ in part], [number for _, number in part]
                texts = [requests[number].continuation for number in numbers]
                scores |= dict(zip(numbers, self._continued(after, rows, texts), strict=True))
                self.continuations += len(part)
                progress(len(part))
        return [scores[number] for number in range(len(requests))]

    def _check(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        check_prompts([context], self.decoder.config, self._bos_id)
        if not len(continuation):
            raise BudgetsError(f"request {number} has nothing to score: its continuation has no token")
        check_prompts([continuation], self.decoder.config, None)
        if (fed := len(context) + len(continuation) - 1) > self.length:
            raise BudgetsError(f"request {number} has {fed} tokens to take in; the model has room for {self.length}")

    def _continued(self, after: tuple, rows: list[int], continuations: list[Sequence[int]]) -> list[Score]:
        """The scores of at most `rows` continuations of the contexts in these rows."""
        longest = max(map(len, continuations))
        width = next(width for width in (8, 32, 128, 512, longest) if longest <= width)
        tokens_BT, count_B = np.zeros((self.rows, width), np.int32), np.ones(self.rows, np.int32)
        row_B = np.zeros(self.rows, np.int32)
        row_B[: len(rows)] = rows
        for n, tokens in enumerate(continuations):
            tokens_BT[n, : len(tokens)], count_B[n] = tokens, len(tokens)
        found = _score(self.decoder.graph, self.decoder.parameters, *after, row_B, tokens_BT, count_B)
        log_BT, likeliest_BT = (np.asarray(x) for x in found)
        return [
            Score(float(log_BT[n, : len(tokens)].sum(dtype=np.float64)), bool(likeliest_BT[n, : len(tokens)].all()))
            for n, tokens in enumerate(continuations)
        ]


def _parts(everything: Sequence, size: int) -> Iterable[Sequence]:
    return (everything[start : start + size] for start in range(0, len(everything), size))


@functools.partial(jax.jit, static_argnums=0)
def _score(graph, parameters, logits_BV, cache, row_B, tokens_BT, count_B):
    """The log-probability of each token and whether it is the likeliest, [B, T], after the contexts in these rows.

    What follows the first `count_B` tokens is padding.
    """
    model: Transformer = nnx.merge(graph, parameters)
    logits_BV, cache = jax.tree.map(lambda x: x[row_B], (logits_BV, cache))
    last = model.config.max_length - 1  # padding may go beyond the model's positions
    position_BT = jnp.minimum(cache.position[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), last)
    layers = cast(tuple[PrunedLayerCache, ...], cache.layers)
    attends = [functools.partial(layer.take_in, cache.position, count_B - 1, empty=False) for layer in layers]
    x_BTE, _ = run_layers(model, model.embed(tokens_BT, position_BT), position_BT, attends)
    after_BTV = model.logits(model.normalised(x_BTE))
    logits_BTV = jnp.concatenate([logits_BV[:, None], after_BTV[:, :-1]], axis=1)
    picked_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    likeliest_BT = jnp.argmax(logits_BTV, axis=-1) == tokens_BT
    return picked_BT - jax.nn.logsumexp(logits_BTV, axis=-1), likeliest_BT
