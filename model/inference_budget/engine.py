"""Continuous batching: a fixed number of rows decode together, and who has ended makes room for the next prompt.

The host looks every so many steps. Between two looks the device draws and takes in tokens by itself; at a look a prompt
that has been taken in, a chunk at a time beside decoding, gets the row of one that has ended. Shape letters: README.md.
"""

import collections
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from selective_attention import Cache, Transformer

from .budgets import Budgets, BudgetsError
from .generation import Decoder
from .policies import EvictionPolicy, policy_for
from .requests import (
    DEFAULT_CLASS,
    Completion,
    FinishReason,
    GenerationRequest,
    Progress,
    TokenLogprob,
    check_request,
)
from .rows import NOTHING, Drawn, Rows, Scores, admit, asked_of, decode_rows, free_rows, take_chunk

BLOCK = 64  # tokens of a prompt that are taken in at a time


@dataclasses.dataclass(eq=False)
class _Live:
    """A request that has not come to its end."""

    number: int
    request: GenerationRequest
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None

    def take(self, tokens: list[int], scores: list[np.ndarray]) -> Progress:
        """Takes in what was drawn, the token that ends it included, with `Drawn`'s other arrays for these tokens."""
        request = self.request
        reason: FinishReason | None = None
        if tokens and tokens[-1] in request.stop_ids:
            tokens, reason = tokens[:-1], "stop"
        elif len(self.tokens) + len(tokens) == request.num_tokens:
            reason = "length"
        self.tokens += tokens
        if request.logprobs is None:
            return Progress(self.number, tokens, None, reason)
        logprobs = self._logprobs([x[: len(tokens)] for x in scores])
        self.logprobs += logprobs
        return Progress(self.number, tokens, logprobs, reason)

    def take_prompt(self, scores: Sequence[Scores]) -> Progress:
        """Takes in what the model makes of the prompt's tokens, a chunk after the other, each but the last of T."""
        of_all = [np.concatenate([np.asarray(x)[0] for x in parts]) for parts in zip(*scores, strict=True)]
        self.prompt_logprobs = self._logprobs([x[: len(self.request.prompt) - 1] for x in of_all])
        reason: FinishReason | None = None if self.request.num_tokens else "length"
        return Progress(self.number, [], [], reason, self.prompt_logprobs)

    def _logprobs(self, scores: Sequence[np.ndarray]) -> list[TokenLogprob]:
        logprob_C, ids_CA, likeliest_CA = scores
        most = self.request.logprobs
        told = (x.tolist() for x in (logprob_C, ids_CA[:, :most], likeliest_CA[:, :most]))
        return [
            TokenLogprob(logprob, tuple(zip(ids, likeliest, strict=True)))
            for logprob, ids, likeliest in zip(*told, strict=True)
        ]

    def completion(self, reason: FinishReason) -> Completion:
        logprobs = None if self.request.logprobs is None else self.logprobs
        return Completion(self.number, self.request, self.tokens, logprobs, reason, self.prompt_logprobs)


_News = tuple[_Live, Progress]


class Engine:
    """Continues any number of prompts in a fixed number of rows, and in the same memory.

    A request's tokens depend on the request alone: greedy ones are those of `Decoder.generate`, sampled ones are drawn
    with the request's own seed and each token's number. `submit` and `cancel` may be called from any thread; `step` and
    iteration from one, which under a mesh has it set.

    Args:
      model: the transformer; under a mesh, with its parameters on it.
      budgets, policy: of requests of the class "default".
      rows: requests of a class that decode together.
      steps: tokens that each of them draws between two looks of the host, at most.
      block: tokens of a prompt that are taken in at a time.
      cache_dtype: as in `Decoder`.
      bos_id: the id of <BOS>, which prompts are then checked to start with.
      more_classes: further names of budgets that a request may ask for. Each has rows of its own.

    Raises:
      BudgetsError: budgets or a policy that do not fit the model, or a number below 1.
    """

    def __init__(
        self,
        model: Transformer,
        budgets: Budgets,
        policy: EvictionPolicy,
        *,
        rows: int = 8,
        steps: int = 16,
        block: int | None = None,
        cache_dtype: Any = None,
        bos_id: int | None = None,
        more_classes: Mapping[str, tuple[Budgets, EvictionPolicy]] | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("steps", steps)):
            if value < 1:
                raise BudgetsError(f"{name} must be at least 1, got {value}")
        if DEFAULT_CLASS in (more_classes or {}):
            raise BudgetsError(f"{DEFAULT_CLASS!r} is the class of the budgets themselves; give another name")
        block = min(BLOCK if block is None else block, model.config.max_length)
        decoder = Decoder(model, budgets, policy, cache_dtype=cache_dtype, block=block, bos_id=bos_id)
        self.config, self._bos_id = model.config, bos_id
        self.classes = {DEFAULT_CLASS: (budgets, policy), **(more_classes or {})}
        self._batches = {
            name: _Batch(
                decoder, limits, policy_for(who, model), rows=rows, steps=steps, block=block, dtype=decoder.cache_dtype
            )
            for name, (limits, who) in self.classes.items()
        }
        self._lock = threading.Lock()
        self._live: dict[int, _Live] = {}
        self._cancelled: set[int] = set()
        self._next = 0

    @property
    def pending(self) -> int:
        """Requests that have not come to their end."""
        return len(self._live)

    def check(self, request: GenerationRequest) -> None:
        """Raises BudgetsError or SamplingError for what `submit` refuses."""
        check_request(request, self.config, self._bos_id, self.classes)

    def submit(self, request: GenerationRequest) -> int:
        """Takes a request in; the number that it has from now on.

        Raises:
          BudgetsError, SamplingError: it cannot be generated; the message names the field and its value.
        """
        self.check(request)
        with self._lock:
            live = _Live(self._next, request)
            self._next += 1
            self._live[live.number] = live
            self._batches[request.budget_class].waiting.append(live)
        return live.number

    def cancel(self, number: int) -> None:
        """Ends a request at the next look; one that has ended stays as it is."""
        with self._lock:
            if number in self._live:
                self._cancelled.add(number)

    def step(self) -> list[Progress]:
        """Takes in chunks of prompts and draws up to `steps` tokens in each row: what came out since the last call, in
        the order in which requests of a class ended. Without anything to do it is empty, at once.
        """
        return [progress for _, progress in self._look()]

    def __iter__(self) -> Iterator[Completion]:
        """Completions as requests end, until none is left."""
        while self._live:
            for live, progress in self._look():
                if progress.finish_reason is not None:
                    yield live.completion(progress.finish_reason)

    def _look(self) -> list[_News]:
        with self._lock:
            cancelled = [self._live[number] for number in sorted(self._cancelled)]
            self._cancelled.clear()
            news = [self._ended_early(live) for live in cancelled]
        rounds = [(batch, batch.start()) for batch in self._batches.values()]  # the device has all before one is read
        for batch, drawn in rounds:
            news += batch.read(drawn)
        with self._lock:
            for live, progress in news:
                if progress.finish_reason is not None:
                    del self._live[live.number]
                    self._cancelled.discard(live.number)
        return news

    def _ended_early(self, live: _Live) -> _News:
        self._batches[live.request.budget_class].drop(live)
        logprobs: list[TokenLogprob] | None = None if live.request.logprobs is None else []
        return live, Progress(live.number, [], logprobs, "cancelled")


class _Lane:
    """A prompt that is being taken in, or waits for a row."""

    def __init__(self, live: _Live) -> None:
        self.live, self.taken = live, 0
        self.logits_1V: Array | None = None
        self.cache: Cache | None = None
        self.scores: list[Scores] = []  # of each chunk, if they are wanted

    @property
    def is_ready(self) -> bool:
        return self.taken >= len(self.live.request.prompt)


class _Batch:
    """The rows of one class of budgets, what waits for them, and the prompt that is taken in next."""

    def __init__(
        self,
        decoder: Decoder,
        budgets: Budgets,
        policy: EvictionPolicy,
        *,
        rows: int,
        steps: int,
        block: int,
        dtype: Any,
    ) -> None:
        self.waiting: collections.deque[_Live] = collections.deque()
        self._model, self._vocab_size = (decoder.graph, decoder.parameters), decoder.config.vocab_size
        self._options = {"budgets": budgets, "policy": policy, "dtype": dtype}
        self._steps, self._block = steps, block
        self._rows: Rows = free_rows(decoder.config, rows, budgets, policy, dtype)
        self._held: list[_Live | None] = [None] * rows
        self._lane: _Lane | None = None
        self._scored: list[_Lane] = []  # prompts that were taken in, and whose scores are to be read

    def drop(self, live: _Live) -> None:
        """Frees whatever place the request has."""
        if self._lane is not None and self._lane.live is live:
            self._lane = None
        elif live in self._held:
            self._held[self._held.index(live)] = None
        else:
            self.waiting.remove(live)

    def start(self) -> Drawn | None:
        """Fills free rows, then starts a round, which a chunk of the next prompt follows while the host reads."""
        for _ in range(self._held.count(None)):  # the more rows are free, the more decoding waits for prompts
            self._take_chunk()
            self._fill_row()
        if not any(self._held):
            return None
        going_B = np.array([live is not None for live in self._held])
        hurry = np.bool_(self._lane is not None or bool(self.waiting))
        self._rows, drawn = decode_rows(*self._model, self._rows, going_B, hurry, steps=self._steps)
        self._take_chunk()
        return drawn

    def read(self, drawn: Drawn | None) -> list[_News]:
        """What came out for each request, those that ended in their order; their rows are free."""
        of_prompts = [(lane.live, lane.live.take_prompt(lane.scores)) for lane in self._scored]
        self._scored.clear()
        return of_prompts if drawn is None else of_prompts + self._read_rows(drawn)

    def _read_rows(self, drawn: Drawn) -> list[_News]:
        tokens_CB = np.asarray(drawn.tokens)
        scored = any(live is not None and live.request.logprobs is not None for live in self._held)
        scores = [np.asarray(x) for x in drawn[1:]] if scored else []
        news: list[tuple[int, _News]] = []
        for row, live in enumerate(self._held):
            if live is None:
                continue
            new = tokens_CB[tokens_CB[:, row] != NOTHING, row].tolist()
            progress = live.take(new, [x[: len(new), row] for x in scores])
            news.append((len(new), (live, progress)))
            if progress.finish_reason is not None:
                self._held[row] = None
        return [one for _, one in sorted(news, key=lambda one: one[0])]

    def _take_chunk(self) -> None:
        """Takes in the next tokens of the prompt in the lane, or of the first that waits."""
        if self._lane is None:
            if not self.waiting:
                return
            self._lane = _Lane(self.waiting.popleft())
        lane = self._lane
        if lane.is_ready:
            return
        prompt = lane.live.request.prompt
        chunk = prompt[lane.taken : lane.taken + self._block]
        tokens_1T, next_1T = np.zeros((2, 1, self._block), np.int32)
        tokens_1T[0, : len(chunk)] = chunk
        after = prompt[lane.taken + 1 : lane.taken + 1 + self._block]
        next_1T[0, : len(after)] = after
        length_1 = np.array([len(prompt)], np.int32)
        if lane.cache is None:
            length_1 = np.minimum(length_1, self._block)
        scored = lane.live.request.score_prompt
        lane.logits_1V, lane.cache, scores = take_chunk(
            *self._model, lane.cache, tokens_1T, length_1, next_1T, np.bool_(scored), **self._options
        )
        lane.taken += len(chunk)
        if scored:
            lane.scores.append(scores)
        if lane.is_ready and not lane.live.request.num_tokens:  # which needs no row
            self._scored.append(lane)
            self._lane = None

    def _fill_row(self) -> None:
        lane = self._lane
        if lane is None or not lane.is_ready or None not in self._held:
            return
        row = self._held.index(None)
        asked = asked_of(lane.live.request, self._vocab_size)
        self._rows = admit(self._rows, np.int32(row), lane.logits_1V, lane.cache, asked)
        self._held[row], self._lane = lane.live, None
        if lane.scores:
            self._scored.append(lane)
