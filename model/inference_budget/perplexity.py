"""Perplexity under budgets: one parallel pass, token for token what decoding with the pruned cache gives.

Layers are computed in order, all positions at once (see `eviction`), for many candidate budgets together: candidates
that agree in the lower layers share them, and the activations of one base allocation are kept, so that lowering a
single layer's budget costs only the layers from there on.

The rows of a batch are windows times candidates here. Shape letters: README.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from selective_attention import Transformer, selective_attention
from selective_attention.quantised import as_held, check_cache_dtype, selecting_dtype

from .budgets import Budgets, BudgetsError, check_budgets
from .eviction import Arriving, Projections, attend_evicting
from .policies import EvictionPolicy, policy_for

TOKENS_PER_PASS = 8_192  # rows times positions that a layer takes at once
CANDIDATES_PER_PASS = 8


@dataclasses.dataclass(frozen=True)
class Windows:
    """Text to predict: row w is given <BOS> and its first N - 1 targets, and each target counts once."""

    inputs: np.ndarray  # int32 [W, N], starting with <BOS>
    targets: np.ndarray  # int32 [W, N]

    @property
    def length(self) -> int:
        """N, tokens of a window."""
        return self.inputs.shape[1]

    def __len__(self) -> int:
        return self.inputs.shape[0]


@dataclasses.dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods in nats, float64: means over the positions of each window."""

    windows: np.ndarray  # [W], over all positions
    last_quarter: np.ndarray  # [W], over the last quarter, where budgets bind most

    @classmethod
    def of(cls, nll_WN: np.ndarray) -> "Losses":
        """From every target's negative log-likelihood, [W, N]."""
        nll_WN = np.asarray(nll_WN, np.float64)
        return cls(nll_WN.mean(axis=1), nll_WN[:, -max(nll_WN.shape[1] // 4, 1) :].mean(axis=1))

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.windows.mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.mean)

    @property
    def last_quarter_perplexity(self) -> float:
        """exp of the mean over the last quarter."""
        return math.exp(float(self.last_quarter.mean()))

    def minus(self, other: "Losses") -> tuple[float, float]:
        """The mean difference of two on the same windows, nats per token, and its standard error from the pairs."""
        differences_W = self.windows - other.windows
        error = differences_W.std(ddof=1) / math.sqrt(len(differences_W)) if len(differences_W) > 1 else math.nan
        return float(differences_W.mean()), float(error)


class Evaluator:
    """Losses of one model on the same windows, under any budgets of one policy.

    Args:
      model: the transformer, on one device.
      windows: the text, in windows of at most the model's context.
      policy: decides who leaves; None where every layer holds everything.
      cache_dtype: as in `Decoder`: attention is over keys and values as that cache gives them back.
      progress: called after each pass through a layer.

    Raises:
      BudgetsError: windows longer than the model's context or with tokens that it does not have, or a policy that is
        not defined on it.
      ValueError: a dtype that a cache cannot have.
    """

    def __init__(
        self,
        model: Transformer,
        windows: Windows,
        policy: EvictionPolicy | None,
        *,
        cache_dtype: Any = None,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        if windows.length > model.config.max_length:
            raise BudgetsError(f"windows of {windows.length} tokens; the model was made for {model.config.max_length}")
        for tokens_WN in (windows.inputs, windows.targets):
            if tokens_WN.min() < 0 or tokens_WN.max() >= model.config.vocab_size:
                raise BudgetsError(
                    f"windows with tokens from {tokens_WN.min()} to {tokens_WN.max()}; the model's are from 0 to "
                    f"{model.config.vocab_size - 1}"
                )
        self.policy = None if policy is None else policy_for(policy, model)
        self.config, self.windows = model.config, windows
        self._cache_dtype = check_cache_dtype(cache_dtype, model.config.dtype)
        self._graph, self._parameters = nnx.split(model)
        self._progress = progress
        rows = max(1, min(len(windows), TOKENS_PER_PASS // windows.length))
        parts = -(-len(windows) // rows)
        self._rows = -(-len(windows) // parts)
        self._together = max(1, min(CANDIDATES_PER_PASS, TOKENS_PER_PASS // (self._rows * windows.length)))
        self._kept: list[dict[tuple[int, ...], Array]] = [{} for _ in range(parts)]

    def losses(self, candidates: Sequence[Budgets]) -> list[Losses]:
        """The losses under each candidate, in their order."""
        for budgets in candidates:
            self._check(budgets)
        wanted = [budgets.tokens for budgets in candidates]
        nll_CWN = np.empty((len(candidates), len(self.windows), self.windows.length), np.float32)
        for part, start in enumerate(range(0, len(self.windows), self._rows)):
            rows = slice(start, min(start + self._rows, len(self.windows)))
            targets = self._padded(self.windows.targets[rows])
            ends = self._through_layers(part, rows, wanted)
            for group in _groups(list(ends), self._together):
                x_BNE = jnp.concatenate([ends[tokens] for tokens in group])
                nll_BN = _nll(self._graph, self._parameters, x_BNE, np.concatenate([targets] * len(group)))
                for tokens, nll in zip(group, np.split(np.asarray(nll_BN), len(group)), strict=True):
                    for number in (n for n, w in enumerate(wanted) if w == tokens):
                        nll_CWN[number, rows] = nll[: rows.stop - rows.start]
        return [Losses.of(nll_WN) for nll_WN in nll_CWN]

    def keep(self, base: Budgets) -> None:
        """Keeps every layer's activations under `base` (W N d_model values a layer), and drops those of the last."""
        self._check(base)
        for part, start in enumerate(range(0, len(self.windows), self._rows)):
            rows = slice(start, min(start + self._rows, len(self.windows)))
            kept: dict[tuple[int, ...], Array] = {}
            self._through_layers(part, rows, [base.tokens], kept)
            self._kept[part] = kept

    def tokens_held(self, budgets: Budgets) -> np.ndarray:
        """How many tokens each query sees in each layer, itself included, int64 [L, W * R, N]: what the policy keeps.

        R is as in `eviction_times`. Without a policy nothing leaves.
        """
        self._check(budgets)
        shape = self.config.num_layers, *self.windows.inputs.shape
        if self.policy is None:
            return np.broadcast_to(np.arange(1, self.windows.length + 1), shape)
        held = []
        for start in range(0, len(self.windows), self._rows):
            tokens_BN = self._padded(self.windows.inputs[start : start + self._rows])
            _, hidden_at = _evicting(self._graph, self._parameters, tokens_BN, budgets, self.policy)
            held.append(tokens_held(np.asarray(hidden_at)))
        rows = held[0].shape[1] // self._rows * len(self.windows)
        return np.concatenate(held, axis=1)[:, :rows]

    def _check(self, budgets: Budgets) -> None:
        check_budgets(budgets, self.config)
        if budgets.context_length != self.windows.length:
            raise BudgetsError(f"budgets for a context of {budgets.context_length}, windows of {self.windows.length}")

    def _through_layers(
        self,
        part: int,
        rows: slice,
        wanted: Sequence[tuple[int, ...]],
        keep_in: dict[tuple[int, ...], Array] | None = None,
    ) -> dict[tuple[int, ...], Array]:
        """The activations after the last layer of each distinct allocation, from the longest prefix that is kept."""
        kept = self._kept[part]
        inputs: dict[tuple[int, ...], Array] = {}
        for layer in range(self.config.num_layers + 1):
            outputs: dict[tuple[int, ...], Array] = {}
            missing = []
            for prefix in dict.fromkeys(tokens[:layer] for tokens in wanted):
                if prefix in kept:
                    outputs[prefix] = kept[prefix]
                elif layer == 0:
                    tokens_BN = self._padded(self.windows.inputs[rows])
                    outputs[prefix] = _embed(self._graph, self._parameters, tokens_BN)
                else:
                    missing.append(prefix)
            for group in _groups(missing, self._together):
                x_BNE = jnp.concatenate([inputs[prefix[:-1]] for prefix in group])
                budget_B = np.repeat(np.array([prefix[-1] for prefix in group], np.int32), self._rows)
                binding = any(prefix[-1] < self.windows.length for prefix in group)
                policy = self.policy if self.policy and (binding or self.policy.shrinks) else None
                options = {"policy": policy, "cache_dtype": self._cache_dtype}
                after, _ = layer_pass(self._graph, self._parameters, x_BNE, layer - 1, budget_B, **options)
                outputs |= dict(zip(group, jnp.split(after, len(group)), strict=True))
                self._progress()
            if keep_in is not None:
                keep_in |= outputs
            inputs = outputs
        return inputs

    def _padded(self, tokens_BN: np.ndarray) -> np.ndarray:
        """The last part has as many rows as the others, so that nothing is compiled for it alone."""
        return np.resize(tokens_BN, (self._rows, self.windows.length))


def eviction_times(
    model: Transformer, tokens_BN: Array, budgets: Budgets, policy: EvictionPolicy
) -> tuple[Array, Array]:
    """When each token leaves each layer, int32 [L, B * R, N]: the position of the first query that does not see it.

    R is 1, or the number of key/value heads for a policy that evicts per head. Where a token stays, a number above N.
    Also returns the logits [B, N, V] under these evictions.

    Raises:
      BudgetsError: as `Evaluator`.
    """
    check_budgets(budgets, model.config)
    graph, parameters = nnx.split(model)
    x_BNE, hidden_at = _evicting(graph, parameters, tokens_BN, budgets, policy_for(policy, model))
    return hidden_at, _logits(graph, parameters, x_BNE)


def _evicting(graph, parameters, tokens_BN, budgets: Budgets, policy: EvictionPolicy) -> tuple[Array, Array]:
    """The last layer's output, and as `eviction_times`."""
    x_BNE, hidden_at = _embed(graph, parameters, tokens_BN), []
    for layer, budget in enumerate(budgets.tokens):
        budget_B = np.full(x_BNE.shape[0], budget, np.int32)
        x_BNE, layer_hidden_at = layer_pass(graph, parameters, x_BNE, layer, budget_B, policy=policy)
        hidden_at.append(layer_hidden_at)
    return x_BNE, jnp.stack(hidden_at)


def tokens_held(hidden_at: Array | np.ndarray) -> np.ndarray:
    """How many tokens each query sees, itself included, int64 [..., N], from `eviction_times`."""
    length = hidden_at.shape[-1]
    rows = np.minimum(hidden_at, length).reshape(-1, length)
    left = np.stack([np.bincount(row, minlength=length + 1)[:length] for row in rows]).cumsum(axis=1)
    return (np.arange(1, length + 1) - left).reshape(hidden_at.shape)


def _groups(prefixes: Sequence, most: int) -> Iterator[list]:
    """Groups whose sizes are powers of two, at most `most`, so that few shapes are compiled."""
    start = 0
    while start < len(prefixes):
        size = 1 << (min(most, len(prefixes) - start).bit_length() - 1)
        yield list(prefixes[start : start + size])
        start += size


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph, parameters, tokens_BN):
    return nnx.merge(graph, parameters).embed(tokens_BN, np.arange(tokens_BN.shape[1]))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("policy", "cache_dtype"))
def layer_pass(
    graph: nnx.GraphDef,
    parameters: nnx.State,
    x_BNE: Array,
    layer: Array | int,
    budget_B: Array,
    *,
    policy: EvictionPolicy | None,
    cache_dtype: Any = None,
) -> tuple[Array, Array | None]:
    """One layer, whose number and whose rows' budgets are traced: its output, and when each token leaves it.

    Without a policy nothing is evicted. Keys and values are rounded as a cache of `cache_dtype` does, if there is one.
    """
    model = nnx.merge(graph, parameters)
    c, (batch, length) = model.config, x_BNE.shape[:2]

    def attend(q, k, v, q_sel, k_sel):
        if cache_dtype is not None:
            k, v = as_held(k, cache_dtype), as_held(v, cache_dtype)
            k_sel = None if k_sel is None else as_held(k_sel, selecting_dtype(cache_dtype, c.dtype))
        if policy is None:
            out = selective_attention(
                q, k, v, q_sel=q_sel, k_sel=k_sel, selection=c.selection, implementation=c.attention
            )
            return out, None
        zeros_B = jnp.zeros(batch, jnp.int32)
        arriving = Arriving(zeros_B, zeros_B + length, budget_B, layer)
        out, _, hidden_at = attend_evicting(policy, c, None, Projections(q, k, v, q_sel, k_sel), arriving)
        return out, hidden_at

    graph, stacked = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda p: p[layer], stacked))
    return block(x_BNE, np.arange(length), attend)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, parameters, x_BNE):
    model = nnx.merge(graph, parameters)
    return model.logits(model.normalised(x_BNE))


@functools.partial(jax.jit, static_argnums=0)
def _nll(graph, parameters, x_BNE, targets_BN):
    logits_BNV = _logits(graph, parameters, x_BNE)
    picked_BN = jnp.take_along_axis(logits_BNV, targets_BN[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BNV, axis=-1) - picked_BN
