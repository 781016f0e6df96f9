"""What the engine is asked for, and what it answers."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from selective_attention import SamplingError, TransformerConfig
from selective_attention.transformer.sampling import check_sampling

from .budgets import BudgetsError
from .generation import check_prompt

MAX_LOGPROBS = 20  # likeliest tokens of which a request may have the log-probabilities
DEFAULT_CLASS = "default"

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how it shall go on. The same request has the same answer, whatever else is running.

    Attributes:
      prompt: token ids, <BOS> first.
      num_tokens: how many tokens are drawn at most; together with the prompt at most the model's `max_length`. 0 scores
        the prompt alone.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw only from so many likeliest tokens.
      top_p: draw only from the fewest that have this probability together.
      seed: of the request's own random numbers, at least 0.
      stop_ids: tokens that end the continuation, and are not in it.
      budget_class: one of the engine's names of budgets.
      logprobs: None for no log-probabilities, 0 for that of each drawn token, n for those of the n likeliest beside it.
      score_prompt: whether the prompt's tokens have log-probabilities, too.
    """

    prompt: Sequence[int]
    num_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_ids: Sequence[int] = ()
    budget_class: str = DEFAULT_CLASS
    logprobs: int | None = None
    score_prompt: bool = False


class TokenLogprob(NamedTuple):
    """Of a token: what the model makes of it before temperature, top_k and top_p."""

    logprob: float  # nats
    likeliest: tuple[tuple[int, float], ...]  # (token, nats), the likeliest first


class Progress(NamedTuple):
    """What came out of a request since it was last looked at."""

    number: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None  # of each token, if the request wants them
    finish_reason: FinishReason | None  # None while it goes on
    prompt_logprobs: list[TokenLogprob] | None = None  # of all tokens but the first; once, and before any that is drawn


class Completion(NamedTuple):
    """A request that has come to its end."""

    number: int
    request: GenerationRequest
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt's tokens but the first, if the request wants them

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def drawn_tokens(self) -> int:
        """With the one that ended it, if one did."""
        return len(self.tokens) + (self.finish_reason == "stop")


def check_request(
    request: GenerationRequest, config: TransformerConfig, bos_id: int | None, classes: Collection[str]
) -> None:
    """Raises BudgetsError or SamplingError, which names the field and its value, for what cannot be generated."""
    check_prompt(request.prompt, config, bos_id, "the prompt")
    for name in ("num_tokens", "top_k", "seed", "logprobs"):
        value = getattr(request, name)
        if not (_is_whole(value) or (value is None and name in ("top_k", "logprobs"))):
            raise SamplingError(f"{name} must be a whole number, got {value!r}")
    for name in ("temperature", "top_p"):
        value = getattr(request, name)
        if not (_is_number(value) or (value is None and name == "top_p")):
            raise SamplingError(f"{name} must be a number, got {value!r}")
    if request.score_prompt and request.logprobs is None:
        raise SamplingError("score_prompt needs logprobs; give 0, or how many likeliest tokens are told beside each")
    length, num_tokens = len(request.prompt), request.num_tokens
    if request.score_prompt and num_tokens == 0:
        if length > config.max_length:
            raise BudgetsError(f"the prompt has {length} tokens; the model was made for {config.max_length}")
        length, num_tokens = 1, 1  # of which there is room
    check_sampling(config, length, num_tokens, request.temperature, request.top_k, request.top_p)
    if request.seed < 0:
        raise SamplingError(f"seed must not be negative, got {request.seed}")
    most = min(MAX_LOGPROBS, config.vocab_size)
    if request.logprobs is not None and not 0 <= request.logprobs <= most:
        raise SamplingError(f"logprobs must be from 0 to {most}, got {request.logprobs}")
    for token in request.stop_ids:
        if not _is_whole(token) or not 0 <= token < config.vocab_size:
            raise SamplingError(f"stop_ids must be tokens from 0 to {config.vocab_size - 1}, got {token!r}")
    if request.budget_class not in classes:
        known = ", ".join(sorted(classes))
        raise BudgetsError(f"budget_class must be one of {known}, got {request.budget_class!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
