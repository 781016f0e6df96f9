"""Files of prompts and of their completions: one JSON object a line.

A prompt's line has `prompt` (text) or `tokens` (ids, <BOS> first), what of `GenerationRequest` it wants to say, and an
`id`, by default its line's number. A completion's line, in the order of completion:

    {"id": 7, "text": "...", "tokens": [5, 9], "finish_reason": "stop", "prompt_tokens": 12, "drawn_tokens": 3,
     "request": "1f3a..."}

`text` is there with a tokenizer, `logprobs` where they were asked for; `request` says what was asked of which model, so
that a file is never completed for other prompts than it was begun for.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .budgets import BudgetsError
from .requests import Completion, GenerationRequest
from .text import TextTokenizer

NUM_TOKENS = 100  # drawn by default, or what the model's context leaves
_OPTIONS = {field.name for field in dataclasses.fields(GenerationRequest)} - {"prompt", "score_prompt"}
_FIELDS = {"id", "prompt", "tokens", *_OPTIONS}
_START = b'{"id": '  # of a completion's line


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line of a file of prompts."""

    id: str | int
    request: GenerationRequest
    digest: str  # of the request, and of what answers it


def read_objects(path: Path) -> dict[int, dict[str, Any]]:
    """The objects of all lines that are not blank, by their numbers, from 1.

    Raises:
      BudgetsError: the file cannot be read, a line is no object, or there is none.
    """
    objects = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    content = json.loads(line)
                except ValueError as error:
                    raise BudgetsError(f"{path}, line {number} is no JSON: {error}") from error
                if not isinstance(content, dict):
                    raise BudgetsError(f"{path}, line {number} is no JSON object; write {{...}}")
                objects[number] = content
    except OSError as error:
        raise BudgetsError(f"{path} cannot be read: {error.strerror}; give a file of JSON lines") from error
    if not objects:
        raise BudgetsError(f"{path} has no prompt; write one JSON object a line")
    return objects


@dataclasses.dataclass(frozen=True)
class PromptReader:
    """How lines become requests.

    Attributes:
      defaults: fields of `GenerationRequest` for lines that do not say them. To `seed` the line's number is added.
      max_length: the model's context, tokens.
      tokenizer: for prompts of text; None if there is none.
      check: raises BudgetsError or SamplingError for a request that cannot be generated.
      identity: of the model and its budgets.
    """

    defaults: dict[str, Any]
    max_length: int
    tokenizer: TextTokenizer | None
    check: Callable[[GenerationRequest], None]
    identity: str

    def read(self, path: Path, objects: Mapping[int, dict[str, Any]]) -> list[PromptLine]:
        """The requests of a file's objects.

        Raises:
          BudgetsError: a line cannot be used; the message has its number.
        """
        lines, seen = list[PromptLine](), dict[str | int, int]()
        for number, content in objects.items():
            try:
                line = self._line(number, content)
            except ValueError as error:
                raise BudgetsError(f"{path}, line {number}: {error}") from error
            if line.id in seen:
                raise BudgetsError(f"{path}, line {number}: id {line.id!r} is that of line {seen[line.id]}, too")
            seen[line.id] = number
            lines.append(line)
        return lines

    def _line(self, number: int, content: dict[str, Any]) -> PromptLine:
        for name in content.keys() - _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(_FIELDS))}"
            raise BudgetsError(f"unknown field {name!r}; {hint}")
        if ("prompt" in content) == ("tokens" in content):
            raise BudgetsError("give either prompt, a text, or tokens, a list of ids")
        identifier = content.get("id", number)
        if not isinstance(identifier, str | int):
            raise BudgetsError(f"id must be text or a whole number, got {identifier!r}")
        prompt = content["tokens"] if "tokens" in content else self._encoded(content["prompt"])
        options = {**self.defaults, "seed": self.defaults["seed"] + number}
        options |= {name: content[name] for name in _OPTIONS & content.keys()}
        if not isinstance(options["stop_ids"], list | tuple):
            raise BudgetsError(f"stop_ids must be a list of tokens, got {options['stop_ids']!r}")
        if options["num_tokens"] is None and isinstance(prompt, list):
            options["num_tokens"] = max(min(NUM_TOKENS, self.max_length - len(prompt)), 1)
        request = GenerationRequest(prompt, **options)
        self.check(request)
        what = {name: value for name, value in dataclasses.asdict(request).items() if name != "score_prompt"}
        asked = json.dumps([what, self.identity])
        return PromptLine(identifier, request, hashlib.sha256(asked.encode()).hexdigest()[:16])

    def _encoded(self, text: object) -> list[int]:
        if not isinstance(text, str):
            raise BudgetsError(f"prompt must be text, got {text!r}; give ids as tokens")
        if self.tokenizer is None:
            raise BudgetsError("prompt is text, and there is no tokenizer; give one with --tokenizer, or ids as tokens")
        return self.tokenizer.encode(text)


@contextlib.contextmanager
def open_completions(path: Path, lines: Sequence[PromptLine]) -> Iterator["CompletionFile"]:
    """The file to complete; made if there is none. A last line that is not whole is taken off.

    Raises:
      BudgetsError: it cannot be written, or is of other prompts.
    """
    try:
        with open(path, "a+b") as file:
            yield CompletionFile(path, file, lines)
    except OSError as error:
        raise BudgetsError(f"--output={path} cannot be written: {error.strerror}; give another file") from error


class CompletionFile:
    """A file of completions that is written a line at a time, and taken up again where it ended.

    Attributes:
      left: the prompts that it has no completion of.
    """

    def __init__(self, path: Path, file: BinaryIO, lines: Sequence[PromptLine]) -> None:
        self.path, self._file = path, file
        self.left = self._not_yet(lines)

    def write(self, line: PromptLine, completion: Completion, text: str | None) -> None:
        """Adds a completion, which is in the file from then on, whatever becomes of this process."""
        content: dict[str, Any] = {"id": line.id}
        if text is not None:
            content["text"] = text
        content |= {
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "drawn_tokens": completion.drawn_tokens,
        }
        if completion.logprobs is not None:
            content["logprobs"] = [one._asdict() for one in completion.logprobs]
        content["request"] = line.digest
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _not_yet(self, lines: Sequence[PromptLine]) -> list[PromptLine]:
        """The lines that have no completion in the file."""
        left = {line.id: line for line in lines}
        whole, content = 0, b"\n"
        self._file.seek(0)
        for number, content in enumerate(self._file, 1):
            if _is_half(content):
                break
            whole += len(content)
            try:
                done = json.loads(content)
                line = left.pop(done["id"])
                same = line.digest == done["request"]
            except (ValueError, TypeError, KeyError) as error:
                raise BudgetsError(
                    f"{self.path}, line {number} is no completion of these prompts; give another --output"
                ) from error
            if not same:
                raise BudgetsError(
                    f"{self.path}, line {number} is of another request than id {line.id!r} now is, or of another "
                    "model; give another --output"
                )
        self._file.truncate(whole)
        if not (content.endswith(b"\n") or _is_half(content)):
            self._file.write(b"\n")  # all that was missing
        return list(left.values())


def _is_half(line: bytes) -> bool:
    """Whether a completion's line was cut off; anything else that lacks its end is somebody's, and stays."""
    if line.endswith(b"\n") or line[: len(_START)] != _START[: len(line)]:
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False
