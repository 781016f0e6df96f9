"""`python -m inference_budget serve`: answers completions over HTTP."""

import argparse
import importlib
import sys
from typing import Any

from .budgets import BudgetsError
from .loading import add_engine_options, positive


def add(commands: Any) -> None:
    """Adds the command to argparse's."""
    parser: argparse.ArgumentParser = commands.add_parser("serve", help="answer OpenAI's clients over HTTP")
    add_engine_options(parser)
    add = parser.add_argument_group("the server").add_argument
    add("--name", help="the model's name in requests; by default its folder's")
    add("--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=_port, default=8000, help="0 for any that is free (default: %(default)s)")
    add("--api-key-file", metavar="FILE", help="keys, one a line, of which a client must send one; by default none")
    add("--queue", type=positive, default=1024, help="completions that may wait for a row (default: %(default)s)")
    add("--max-body", type=positive, default=1 << 22, help="bytes of a request at most (default: %(default)s)")
    add("--client-seconds", type=_seconds, default=30.0,
        help="for a client to send what it began, or to read on (default: %(default)s)")  # fmt: skip
    add("--drain-seconds", type=_seconds, default=60.0,
        help="to finish what runs after SIGTERM (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run, interrupted="what ran is cancelled")


def run(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
      BudgetsError: a model, budgets, a tokenizer or an address that cannot be used, or the extra is not installed.
      SystemExit: with 1, the engine failed.
    """
    try:
        serve = importlib.import_module(".server.process", __package__).serve
    except ImportError as error:
        raise BudgetsError(f"{error}; install the extra: pip install 'inference-budget[serve]'") from error
    if serve(options):
        sys.exit(1)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 to {(1 << 16) - 1}, not {text}")
    return port


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"must be from 1 to 86400, not {text}")
    return value
