"""Continues prompts with a model and its budgets.

    python -m inference_budget generate --checkpoint FOLDER --budgets budgets.json --prompts FILE --output FILE
    python -m inference_budget serve --checkpoint FOLDER --budgets budgets.json --tokenizer DATASET

Exit codes: 0 done, 1 the server's engine failed, 2 a mistake, which one line names, 130 interrupted.
"""

import argparse
import sys
from typing import NoReturn

from selective_attention import SamplingError

from . import generate_command, serve_command
from .budgets import BudgetsError

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130  # the latter is a shell's for SIGINT


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"error: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> None:
    parser = _Parser(prog="python -m inference_budget", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    generate_command.add(commands)
    serve_command.add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"interrupted; {options.interrupted}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (BudgetsError, SamplingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    main()
