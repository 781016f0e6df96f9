"""`python -m inference_budget generate`: completes a file of prompts."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .loading import Loaded, add_engine_options, load_engine, positive
from .prompts import NUM_TOKENS, CompletionFile, PromptLine, PromptReader, open_completions, read_objects
from .requests import DEFAULT_CLASS


def add(commands: Any) -> None:
    """Adds the command to argparse's."""
    parser: argparse.ArgumentParser = commands.add_parser("generate", help="complete a file of prompts")
    add = parser.add_argument
    add("--prompts", metavar="FILE", required=True, help="a JSON object a line: prompt or tokens, id, options")
    add(
        "--output", metavar="FILE", required=True, help="a JSON object a line, as prompts end; completed if it is there"
    )
    add_engine_options(parser)
    options = parser.add_argument_group("what lines do not say themselves")
    add = options.add_argument
    add("--num-tokens", type=positive, help=f"tokens drawn at most (default: {NUM_TOKENS}, or what the context leaves)")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="divides the logits; 0 takes the likeliest (default: %(default)s)",
    )
    add("--top-k", type=positive, help="draw only from so many likeliest tokens")
    add("--top-p", type=float, help="draw only from the fewest tokens with this probability together, 0 to 1")
    add("--seed", type=int, default=0, help="a line's own is this and its number (default: %(default)s)")
    add("--stop-ids", type=int, nargs="*", help="tokens that end a completion (default: the tokenizer's <EOS>)")
    add("--logprobs", type=int, help="log-probabilities, in nats, of drawn tokens and of so many likeliest")
    parser.set_defaults(run=run, interrupted="the same command goes on from the output")


def run(options: argparse.Namespace) -> None:
    """Completes what of the prompts has no completion yet.

    Raises:
      BudgetsError, SamplingError: something cannot be read, written or generated.
    """
    path = Path(options.prompts)
    objects = read_objects(path)
    loaded = load_engine(options)
    lines = _reader(options, loaded).read(path, objects)
    with open_completions(Path(options.output), lines) as output:
        found = len(lines) - len(output.left)
        if found:
            print(f"{found} of {len(lines)} completions are in {output.path} already", file=sys.stderr)
        _complete(loaded, output)


def _reader(options: argparse.Namespace, loaded: Loaded) -> PromptReader:
    engine, tokenizer = loaded.engine, loaded.tokenizer
    stop_ids = options.stop_ids
    if stop_ids is None:
        stop_ids = [] if tokenizer is None else [tokenizer.eos_id]
    defaults = {
        "num_tokens": options.num_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "stop_ids": stop_ids,
        "budget_class": DEFAULT_CLASS,
        "logprobs": options.logprobs,
    }
    return PromptReader(defaults, engine.config.max_length, tokenizer, engine.check, loaded.identity)


def _complete(loaded: Loaded, output: CompletionFile) -> None:
    engine, lines = loaded.engine, dict[int, PromptLine]()
    for line in output.left:
        lines[engine.submit(line.request)] = line
    progress = _Progress(len(lines))
    for completion in engine:
        prompt, tokens = completion.request.prompt, completion.tokens
        text = None if loaded.tokenizer is None else loaded.tokenizer.continuation(prompt, tokens)
        output.write(lines.pop(completion.number), completion, text)
        progress.completed(completion.drawn_tokens)
    progress.end(output.path)


class _Progress:
    """What has been done, in one line of a terminal; only the end is said elsewhere."""

    def __init__(self, prompts: int) -> None:
        self._prompts, self._done, self._tokens = prompts, 0, 0
        self._start = time.monotonic()
        self._shown = sys.stderr.isatty()

    def completed(self, tokens: int) -> None:
        self._done += 1
        self._tokens += tokens
        if self._shown:
            filled = 30 * self._done // self._prompts
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r[{bar}] {self._done}/{self._prompts} prompts, {self._rate}", end="", file=sys.stderr, flush=True)

    def end(self, path: Path) -> None:
        if self._shown and self._done:
            print(file=sys.stderr)
        print(f"{path}: {self._done} prompts, {self._tokens:,} tokens, {self._rate}")

    @property
    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.1f} tokens/s"
