"""What commands with subcommands and files share: a mistake is one line, and what the exit codes are."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from data import DataError
from inference_budget import BudgetsError
from selective_attention import SamplingError

EXIT_MISTAKE, EXIT_INTERRUPTED, EXIT_UNREAD = 2, 130, 141  # the last two are a shell's for SIGINT and SIGPIPE


class InputError(ValueError):
    """A file or an option that cannot be used; the message says which and what to do."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"error: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    """The type of an option that is a number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def run_to_the_end(run: Callable[[], object], interrupted: str) -> None:
    """Runs a command; a mistake is one line and exit code 2, `interrupted` is what is said of an interruption."""
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        _leave(EXIT_UNREAD)
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED, f"interrupted; {interrupted}")
    except (InputError, DataError, BudgetsError, SamplingError) as error:
        _leave(EXIT_MISTAKE, f"error: {error}")
    except OSError as error:
        _leave(
            EXIT_MISTAKE, f"error: {error.filename or 'the output'}: {error.strerror or error}; see to it and try again"
        )


def _leave(code: int, line: str = "") -> NoReturn:
    if line:
        print(line, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # or Python would try once more at its end, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
