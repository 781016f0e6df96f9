"""What the body of a request to /v1/completions asks for, every field checked."""

import dataclasses
import difflib
import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..text import TextTokenizer
from .errors import ApiError, invalid

MAX_TEMPERATURE = 100
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings, and characters of each
# Fields of OpenAI's that would change the answer, and the value at which they do nothing.
NEUTRAL: dict[str, Any] = {
    "suffix": "", "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
}  # fmt: skip
# Those that this server has, some of them beyond OpenAI's.
KNOWN = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop", "stop_token_ids",
    "stream", "stream_options", "logprobs", "echo", "seed", "user", "budget", *NEUTRAL,
)  # fmt: skip
MAX_FIELDS = 100
# Of one answer, tokens and the likeliest ones beside them: what is kept in memory until a client has read it.
MAX_VALUES = 1 << 20
SEEDS = 1 << 32
GOLDEN = 0x9E3779B1  # an odd number: no two choices of a request have one seed


@dataclasses.dataclass(frozen=True)
class Served:
    """What there is to ask for.

    Attributes:
      name: of the model.
      budget_classes: names of the engine's budgets, the default first.
      max_length: tokens of prompt and continuation together, at most.
      vocab_size: of the model, which may have more tokens than the tokenizer.
      max_sequences: continuations of one request, at most.
      max_logprobs: likeliest tokens that are told at each position, at most.
    """

    name: str
    tokenizer: TextTokenizer
    budget_classes: tuple[str, ...]
    max_length: int
    vocab_size: int
    max_sequences: int
    max_logprobs: int

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of text that each of the tokenizer's tokens stands for."""
        return self.tokenizer.pieces()

    @functools.cached_property
    def longest_piece(self) -> int:
        """Characters of text that a token stands for, at most."""
        return max(map(len, self.pieces))

    @property
    def names(self) -> tuple[str, ...]:
        """What a request's `model` may be."""
        return self.name, *(f"{self.name}@{budgets}" for budgets in self.budget_classes)


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request that can be served.

    Attributes:
      model, prompts: as in the request; token ids, <BOS> first.
      texts: of each prompt, None where token ids were given.
      top_p, top_k: None where they leave nothing out.
      stop, stop_ids: strings and tokens that end a continuation.
      logprobs: how many of the likeliest tokens are told beside the drawn one; None for no log-probabilities.
      echo: whether the answer begins with the prompt, and has its tokens' log-probabilities, too.
      seed: of the first choice; by default a random one.
    """

    model: str
    budget_class: str
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str | None, ...]
    n: int
    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    logprobs: int | None
    echo: bool
    seed: int
    stream: bool
    include_usage: bool

    def seed_of(self, index: int) -> int:
        """The seed of one of the choices: the first has the request's own."""
        return (self.seed + index * GOLDEN) % SEEDS


def parse(body: bytes, served: Served) -> CompletionRequest:
    """What a body asks for.

    Raises:
      ApiError: it asks for nothing that there is; the message says which field is wrong and what it may be.
    """
    content = _object(body)
    fields = _Fields(content)
    for name in content:
        _check_name(name)
    for name, neutral in NEUTRAL.items():
        if content.get(name) is not None and content[name] != neutral:
            raise invalid(name, f"{name} is not supported by this server; leave it out")
    model, budget_class = _model(fields.text("model"), fields.text("budget"), served)
    echo = fields.flag("echo")
    max_tokens = fields.whole("max_tokens", 0 if echo else 1, served.max_length - 1)
    max_tokens = 16 if max_tokens is None else max_tokens  # OpenAI's default
    prompts, texts = _prompts(content.get("prompt"), max_tokens, served)
    n = fields.whole("n", 1, served.max_sequences) or 1
    if content.get("best_of") not in (None, n):
        raise invalid("best_of", f"best_of={content['best_of']!r} is not supported unless it is n, which is {n}")
    logprobs = fields.whole("logprobs", 0, served.max_logprobs)
    _check_size(n, [len(prompt) * echo + max_tokens for prompt in prompts], max_tokens, logprobs, served)
    temperature = fields.number("temperature", 0, MAX_TEMPERATURE)
    seed = fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    stream = fields.flag("stream")
    return CompletionRequest(
        model=model,
        budget_class=budget_class,
        prompts=prompts,
        texts=texts,
        n=n,
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=_top_p(fields),
        top_k=fields.whole("top_k", 1, served.vocab_size),
        stop=_stops(content.get("stop")),
        stop_ids=(served.tokenizer.eos_id, *_stop_ids(content.get("stop_token_ids"), served)),
        logprobs=logprobs,
        echo=echo,
        seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
        stream=stream,
        include_usage=_include_usage(content.get("stream_options"), stream),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise invalid(None, "the body is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise invalid(None, f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise invalid(None, f"the body must be a JSON object, not {_kind(content)}")
    if len(content) > MAX_FIELDS:
        raise invalid(None, f"the body has {len(content)} fields; this server reads at most {MAX_FIELDS}")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_name(name: str) -> None:
    """Refuses what is one slip away from a field; other fields pass, as with other servers, for clients send many."""
    if name in KNOWN or len(name) > 2 * max(map(len, KNOWN)):
        return
    for near in difflib.get_close_matches(name, KNOWN, 1, 0.85):
        raise invalid(ascii(name)[1:-1], f"there is no field {name!r}; {near!r} is the nearest")


def _model(name: str | None, budget: str | None, served: Served) -> tuple[str, str]:
    """The model's name as it was asked for, and the budget class."""
    if name is None:
        raise invalid("model", f"model is missing; this server has {', '.join(served.names)}")
    if name not in served.names:
        what = f"there is no model {_short(name)}; this server has {', '.join(served.names)}"
        raise ApiError(404, what, param="model", code="model_not_found")
    by_name = name.removeprefix(served.name).removeprefix("@")
    if budget is not None and budget not in served.budget_classes:
        raise invalid("budget", f"there is no budget {_short(budget)}; this server has {_listed(served)}")
    if budget is not None and by_name not in ("", budget):
        raise invalid("budget", f"budget={budget!r} contradicts the model {name!r}; leave one of them out")
    return name, budget or by_name or served.budget_classes[0]


def _check_size(n: int, told: Sequence[int], max_tokens: int, logprobs: int | None, served: Served) -> None:
    """`told` are the tokens of one answer to each prompt, at most."""
    sequences, what = n * len(told), f"{len(told)} prompts with n={n} are {n * len(told)} continuations"
    if sequences > served.max_sequences:
        raise invalid("n", f"{what}; this server takes at most {served.max_sequences} of a request")
    if (values := n * sum(told) * (1 + (logprobs or 0))) > MAX_VALUES:
        what = f"{what} of max_tokens={max_tokens}, with logprobs={logprobs or 0} beside each token {values} values"
        raise invalid("max_tokens", f"{what}; this server answers a request with at most {MAX_VALUES}")


def _prompts(value: Any, max_tokens: int, served: Served) -> tuple[tuple[tuple[int, ...], ...], tuple[str | None, ...]]:
    """Token ids, and the texts where they are those of one."""
    if value is None:
        raise invalid("prompt", "prompt is missing; give a string, strings, token ids, or lists of token ids")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid(
            "prompt", f"prompt must be a string, strings, token ids, or lists of token ids, not {_kind(value)}"
        )
    if len(value) > served.max_sequences:
        raise invalid("prompt", f"{len(value)} prompts are too many; this server takes {served.max_sequences}")
    ids = tuple(_prompt(one, number, max_tokens, served) for number, one in enumerate(value))
    return ids, tuple(one if isinstance(one, str) else None for one in value)


def _prompt(value: Any, number: int, max_tokens: int, served: Served) -> tuple[int, ...]:
    tokenizer, room = served.tokenizer, served.max_length - max_tokens
    if isinstance(value, str):
        least = 1 + len(value) // served.longest_piece
        if least > room:  # which takes no time to see
            raise _too_long(f"at least {least}", number, max_tokens, served)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid("prompt", f"prompt {number} has half a surrogate pair, which is no text") from None
        ids = tokenizer.encode(value)
    elif isinstance(value, list):
        ids = value
    else:
        raise invalid("prompt", f"prompt {number} is {_kind(value)}; it must be a string or a list of token ids")
    if len(ids) > room:
        raise _too_long(str(len(ids)), number, max_tokens, served)
    if ids is value:
        _check_ids(ids, "prompt", f"prompt {number}", served)
        if ids[:1] != [tokenizer.bos_id]:
            raise invalid("prompt", f"prompt {number} must begin with <BOS>, which is {tokenizer.bos_id}")
    return tuple(ids)


def _too_long(tokens: str, number: int, max_tokens: int, served: Served) -> ApiError:
    return invalid(
        "prompt",
        f"this model's maximum context length is {served.max_length} tokens, but prompt {number} has {tokens} and "
        f"max_tokens={max_tokens}; shorten one of them",
        "context_length_exceeded",
    )


def _check_ids(ids: Sequence[Any], param: str, name: str, served: Served) -> None:
    for at, token in enumerate(ids):
        if type(token) is not int:
            raise invalid(param, f"{name} has {_kind(token)} at position {at}; token ids are whole numbers")
        if not 0 <= token < served.vocab_size:
            raise invalid(
                param, f"{name} has token {token} at position {at}; the model's are from 0 to {served.vocab_size - 1}"
            )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", "stop must be a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise invalid("stop", f"stop may be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _stop_ids(value: Any, served: Served) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOPS:
        raise invalid("stop_token_ids", f"stop_token_ids must be a list of at most {MAX_STOPS} token ids")
    _check_ids(value, "stop_token_ids", "stop_token_ids", served)
    return tuple(value)


def _top_p(fields: "_Fields") -> float | None:
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:
        raise invalid("top_p", "top_p must be above 0 and at most 1, not 0; for the likeliest token give temperature=0")
    return None if top_p == 1 else top_p


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise invalid("stream_options", "stream_options belong to stream=true")
    if not isinstance(value, dict):
        raise invalid("stream_options", f"stream_options must be an object, not {_kind(value)}")
    return _Fields(value, "stream_options.").flag("include_usage")


class _Fields:
    """Fields of an object by their type; null is the same as none."""

    def __init__(self, content: Mapping[str, Any], prefix: str = "") -> None:
        self._content, self._prefix = content, prefix

    def text(self, name: str) -> str | None:
        return self._of(name, str, "a string")

    def flag(self, name: str) -> bool:
        return self._of(name, bool, "true or false") or False

    def whole(self, name: str, least: int, most: int) -> int | None:
        return self._within(name, self._of(name, int, "a whole number"), least, most)

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self._of(name, (int, float), "a number")
        return None if value is None else float(self._within(name, value, least, most))

    def _of(self, name: str, kind: Any, described: str) -> Any:
        value = self._content.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise invalid(self._prefix + name, f"{self._prefix}{name} must be {described}, not {_kind(value)}")
        return value

    def _within(self, name: str, value: Any, least: float, most: float) -> Any:
        if value is not None and not least <= value <= most:
            raise invalid(
                self._prefix + name, f"{self._prefix}{name} must be from {least} to {most}, not {_short(value)}"
            )
        return value


_KINDS: dict[type, str] = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number with a point",
}


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else _KINDS[type(value)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(served: Served) -> str:
    return ", ".join(served.budget_classes)
