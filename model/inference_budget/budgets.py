"""How many tokens each layer may hold."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import SupportsIndex

from selective_attention import TransformerConfig

MIN_BUDGET = 2  # <BOS> and the current token, neither of which is ever evicted
PYRAMID_BETA = 20  # how steep PyramidKV's line is; its default


class BudgetsError(ValueError):
    """What this package cannot use, such as budgets, a policy, windows or prompts; the message says why."""


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Tokens held by each layer, <BOS> and the current token included, in contexts of up to `context_length`.

    Raises:
      BudgetsError: what is not a whole number, or a budget below 2 or above the context, with its layer.
    """

    tokens: tuple[int, ...]
    context_length: int

    def __post_init__(self) -> None:
        whole = tuple(_whole_number(budget, f"the budget of layer {n}") for n, budget in enumerate(self.tokens))
        object.__setattr__(self, "tokens", whole)
        object.__setattr__(self, "context_length", _whole_number(self.context_length, "the context"))
        if not self.tokens:
            raise BudgetsError("budgets need at least one layer")
        for layer, budget in enumerate(self.tokens):
            if not MIN_BUDGET <= budget <= self.context_length:
                raise BudgetsError(
                    f"the budget of layer {layer} is {budget}; it must be from {MIN_BUDGET} (<BOS> and the current "
                    f"token) to the context of {self.context_length} tokens"
                )

    @property
    def total(self) -> int:
        """Tokens over all layers."""
        return sum(self.tokens)

    @property
    def memory_factor(self) -> float:
        """`L * N / sum of budgets`, for L layers and contexts of N tokens (section 2 of the paper)."""
        return len(self.tokens) * self.context_length / self.total

    def replaced(self, layer: int, budget: int) -> "Budgets":
        """These budgets with another one in one layer."""
        return Budgets((*self.tokens[:layer], budget, *self.tokens[layer + 1 :]), self.context_length)

    @classmethod
    def full(cls, num_layers: int, context_length: int) -> "Budgets":
        """The whole context in each layer: nothing is ever evicted."""
        return cls((context_length,) * num_layers, context_length)

    @classmethod
    def uniform(cls, num_layers: int, context_length: int, total: int) -> "Budgets":
        """`total` tokens spread evenly; the lowest layers get what does not divide."""
        return cls(_whole([total / num_layers] * num_layers, total, context_length), context_length)

    @classmethod
    def pyramid(cls, num_layers: int, context_length: int, total: int, beta: float = PYRAMID_BETA) -> "Budgets":
        """`total` tokens on PyramidKV's line, which falls linearly from the lowest layer to the highest.

        With the mean c: from `2 c - c / beta` down to `c / beta`; where that leaves a layer less than 2 tokens or more
        than the context, the rest is spread over the other layers.
        """
        mean = total / num_layers
        least, most = mean / beta, 2 * mean - mean / beta
        line = [most - layer * (most - least) / max(num_layers - 1, 1) for layer in range(num_layers)]
        return cls(_whole(line if num_layers > 1 else [mean], total, context_length), context_length)


def check_budgets(budgets: Budgets, config: TransformerConfig) -> None:
    """Raises BudgetsError unless they are budgets for each of the model's layers, in a context that it was made for."""
    if not isinstance(budgets, Budgets):
        raise BudgetsError(f"budgets are given as Budgets(tokens, context_length), not as {budgets!r}")
    if len(budgets.tokens) != config.num_layers:
        raise BudgetsError(f"there are {len(budgets.tokens)} budgets, but the model has {config.num_layers} layers")
    if budgets.context_length > config.max_length:
        raise BudgetsError(
            f"budgets for contexts of {budgets.context_length} tokens; the model was made for at most "
            f"{config.max_length}"
        )


def _whole_number(value: SupportsIndex, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise BudgetsError(f"{name} is {value!r}; it must be a whole number of tokens") from None


def _whole(wanted: Sequence[float], total: int, context_length: int) -> tuple[int, ...]:
    """Whole budgets within bounds that sum to `total`, as close to `wanted` as rounding down and topping up gets."""
    layers = len(wanted)
    if not MIN_BUDGET * layers <= total <= context_length * layers:
        raise BudgetsError(
            f"{total} tokens over {layers} layers are out of range: from {MIN_BUDGET * layers} to "
            f"{context_length * layers}"
        )
    budgets = [min(max(int(w), MIN_BUDGET), context_length) for w in wanted]
    while (rest := total - sum(budgets)) != 0:
        step = 1 if rest > 0 else -1
        open_layers = [n for n in range(layers) if MIN_BUDGET <= budgets[n] + step <= context_length]
        each = max(abs(rest) // len(open_layers), 1)
        for n in open_layers[: abs(rest)]:
            budgets[n] = min(max(budgets[n] + step * each, MIN_BUDGET), context_length)
    return tuple(budgets)
