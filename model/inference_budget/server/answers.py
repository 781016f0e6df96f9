"""What came out of the engine as OpenAI's clients read it: choices with text, log-probabilities and usage."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..requests import Progress, TokenLogprob
from .completions import CompletionRequest
from .text import TextStream


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A token with its log-probabilities, and where its text begins."""

    token: int
    score: TokenLogprob | None  # None of the first of a prompt, which nothing is before
    offset: int


class _Echo:
    """A prompt that an answer begins with.

    Attributes:
      text: as it was given, else that of the tokens.
    """

    def __init__(self, tokens: Sequence[int], text: str | None, pieces: Sequence[bytes]) -> None:
        stream = TextStream(pieces)
        self._tokens, self._offsets = tokens, list[int]()
        for token in tokens:
            self._offsets.append(stream.length)
            stream.add(token)
        stream.close()
        whole = stream.take()
        self.text = whole if text is None else text
        more = len(whole) - len(self.text)  # such as the space that some tokenizers put before a text
        self._offsets = [min(max(at - more, 0), len(self.text)) for at in self._offsets]

    def scored(self, scores: Sequence[TokenLogprob] | None) -> list[_Scored]:
        """All tokens, by the scores of those after the first; none without scores."""
        return [] if scores is None else list(map(_Scored, self._tokens, [None, *scores], self._offsets))


class Choice:
    """One continuation of a request, as it comes.

    Attributes:
      tokens: how many were drawn, up to the one that ended it.
      finish_reason: None as long as it goes on.
    """

    def __init__(self, index: int, asked: CompletionRequest, pieces: Sequence[bytes]) -> None:
        self.index, self.tokens = index, 0
        self.finish_reason: str | None = None
        self._pieces, self._logprobs = pieces, asked.logprobs
        self._text = TextStream(pieces, asked.stop)
        self._scored: list[_Scored] = []
        self._given = 0  # characters
        prompt = index // asked.n
        self._echo = _Echo(asked.prompts[prompt], asked.texts[prompt], pieces) if asked.echo else None
        self._begin = 0 if self._echo is None else len(self._echo.text)  # of the continuation, characters

    def take(self, progress: Progress) -> dict[str, Any] | None:
        """Takes in what came out: the choice of the next event, or None if there is nothing to tell yet."""
        if self.finish_reason is not None:
            return None  # a stop string ended it; the engine has yet to hear of that
        prompt, echoed = "", list[_Scored]()
        if self._echo is not None:
            prompt, echoed = self._echo.text, self._echo.scored(progress.prompt_logprobs)
            self._echo = None
        scores: Sequence[TokenLogprob | None] = progress.logprobs or [None] * len(progress.tokens)
        for token, score in zip(progress.tokens, scores, strict=True):
            if score is not None:
                self._scored.append(_Scored(token, score, self._begin + self._text.length))
            self._text.add(token)
            self.tokens += 1
            if self._text.stopped:
                self.finish_reason = "stop"
                break
        if self.finish_reason is None and progress.finish_reason is not None:
            self._text.close()
            self.finish_reason = "stop" if self._text.stopped else progress.finish_reason
        text = prompt + self._text.take()
        self._given += len(text)
        if not (text or echoed) and self.finish_reason is None:
            return None
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._take_logprobs(echoed),
            "finish_reason": self.finish_reason,
        }

    def _take_logprobs(self, echoed: list[_Scored]) -> dict[str, Any] | None:
        """Of the prompt, and of the tokens whose text was given; at the end also of the rest, unless a stop string cut
        it off.
        """
        if self._logprobs is None:
            return None
        ended = self.finish_reason is not None and not self._text.stopped
        done = [one for one in self._scored if ended or one.offset < self._given]
        self._scored = self._scored[len(done) :]
        done = echoed + done
        return {
            "tokens": [self._shown(one.token) for one in done],
            "token_logprobs": [None if one.score is None else one.score.logprob for one in done],
            "top_logprobs": [self._likeliest(one) for one in done] if self._logprobs else None,
            "text_offset": [one.offset for one in done],
        }

    def _likeliest(self, one: _Scored) -> dict[str, float] | None:
        """The token itself is always among them, as with OpenAI."""
        if one.score is None:
            return None
        likeliest = {self._shown(token): nats for token, nats in one.score.likeliest}
        return likeliest | {self._shown(one.token): one.score.logprob}

    def _shown(self, token: int) -> str:
        """A token as text; one that is no whole characters by its bytes, and one without text by its id."""
        piece = self._pieces[token] if token < len(self._pieces) else b""
        try:
            return piece.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Reply:
    """The answer to one request, whole or as events."""

    def __init__(self, asked: CompletionRequest, pieces: Sequence[bytes]) -> None:
        self._asked = asked
        self.choices = [Choice(index, asked, pieces) for index in range(len(asked.prompts) * asked.n)]
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }

    @property
    def ended(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self._asked.prompts))

    @property
    def tokens(self) -> int:
        """Drawn so far."""
        return sum(choice.tokens for choice in self.choices)

    def event(self, choice: dict[str, Any]) -> dict[str, Any]:
        """An event of a stream."""
        return self._head | {"choices": [choice]} | ({"usage": None} if self._asked.include_usage else {})

    def last_event(self) -> dict[str, Any]:
        """That of the usage."""
        return self._head | {"choices": [], "usage": self._usage()}

    def whole(self, parts: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """The answer without a stream, of the parts that each choice gave."""
        return self._head | {"choices": [_joined(choice) for choice in parts], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt, drawn = self.prompt_tokens, self.tokens
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    logprobs = [part["logprobs"] for part in parts]
    joined = None
    if logprobs[0] is not None:
        joined = {
            name: None if value is None else [x for one in logprobs for x in one[name]]
            for name, value in logprobs[0].items()
        }
    text = "".join(part["text"] for part in parts)
    return parts[-1] | {"text": text, "logprobs": joined}
