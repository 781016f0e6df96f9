"""An item of a task: answers that a model chooses from by how likely it finds each after its context."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from data import Tokenizer
from inference_budget import Request, Score, Scorer
from launch.commands import InputError

Values = dict[str, dict[str, float]]  # by metric, then by item


class TooLongError(InputError):
    """An answer that is longer than the context."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question. With several answers the likeliest is chosen; with one, it is what the model should say."""

    key: str  # unlike all others of its task
    requests: tuple[Request, ...]  # one for each answer
    answers: tuple[str, ...]  # without the space that parts each from its context
    gold: int  # which answer is right
    cut: bool = False  # whether contexts lost their oldest tokens, being too long


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a model made of a task.

    Attributes:
      values: of each item, in items' order; what is reported is their mean.
      chance: the mean accuracy of choosing blindly, None where nothing is chosen.
      totals: metrics that are no means over items, with their standard errors if known.
    """

    values: Values
    chance: float | None = None
    totals: dict[str, tuple[float, float | None]] = dataclasses.field(default_factory=dict)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, name: str) -> Request:
    """Context and continuation as token ids, as lm-evaluation-harness makes them.

    Spaces at the end of the context go to the continuation, and both are encoded as one text, whose first tokens, as
    many as the context alone has, are left out: where a piece crosses the border, they are not what the context ends
    with.

    Raises:
      InputError: a continuation of no tokens; `name` says whose.
    """
    if spaces := len(context) - len(context.rstrip()):
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = tokenizer.encode(context)
    after = tokenizer.encode(context + continuation)[len(before) :]
    if not after:
        raise InputError(f"{name} has a continuation of no tokens, {continuation!r}; give it some text")
    return Request([tokenizer.bos_id, *before], after)


def fitted(request: Request, length: int, name: str) -> Request:
    """The request without the oldest tokens after <BOS>, if it is longer than `length` tokens without the last.

    Raises:
      TooLongError: its continuation alone is.
    """
    if len(request.continuation) > length:
        raise TooLongError(
            f"{name} has a continuation of {len(request.continuation)} tokens, longer than the context of {length}; "
            "leave such questions out with --leave-out-too-long, or take a model with a longer context"
        )
    over = max(len(request.context) + len(request.continuation) - 1 - length, 0)
    return Request([*request.context[:1], *request.context[1 + over :]], request.continuation)


def measure(
    scorer: Scorer, items: Sequence[Item], progress: Callable[[int], object] = lambda done: None
) -> Measurement:
    """acc, acc_norm and bits_per_byte of items with several answers; exact and bits_per_byte of those with one."""
    scores = iter(scorer.score([request for item in items for request in item.requests], progress=progress))
    values: Values = {}
    for item in items:
        for metric, value in _judged(item, [next(scores) for _ in item.requests]).items():
            values.setdefault(metric, {})[item.key] = value
    blind = [1 / len(item.answers) for item in items if len(item.answers) > 1]
    return Measurement(values, float(np.mean(blind)) if blind else None)


def _judged(item: Item, scores: Sequence[Score]) -> dict[str, float]:
    """Ties go to the first answer. Characters and bytes are those of the answer without the space before it."""
    log_A = np.array([score.log_probability for score in scores])
    text = item.answers[item.gold]
    judged = {"bits_per_byte": -float(log_A[item.gold]) / (math.log(2) * len(text.encode()))}
    if len(item.answers) == 1:
        return judged | {"exact": float(scores[0].greedy)}
    characters_A = np.array([len(answer) for answer in item.answers])
    chosen = {"acc": log_A, "acc_norm": log_A / characters_A}
    return {name: float(np.argmax(x) == item.gold) for name, x in chosen.items()} | judged
