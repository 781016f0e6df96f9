"""What goes wrong with data, and how a command of this package ends then: 2 is a mistake, 1 is anything else.

The trainer keeps the same convention; this package imports nothing of it.
"""

import sys
from typing import NoReturn

EXIT_FAILED = 1
EXIT_MISTAKE = 2


class DataError(ValueError):
    """Text, a dataset or a batch request that cannot be used; the message says which and what to do."""


class UnreachableError(DataError):
    """Storage does not give a file now: a mount that is not there yet, a server that does not answer. It may pass."""


class WorkError(DataError):
    """Work that was given up although nothing was asked wrongly: a full disk, a worker that died."""


def end(error: Exception) -> NoReturn:
    """Ends a command with one line on stderr, and the exit code of this error."""
    print(message := f"error: {error}", file=sys.stderr)
    ended = SystemExit(message)
    mistake = isinstance(error, DataError) and not isinstance(error, WorkError)
    ended.code = EXIT_MISTAKE if mistake else EXIT_FAILED
    raise ended
