"""What people read: lines with the time, errors, and commands that can be pasted."""

import re
import time


class UsageError(Exception):
    """Of the person who typed: nothing was changed, exit code 2."""


class BlockedError(Exception):
    """Something else is in the way; running it again goes on. Exit code 1."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM."""


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def printable(text: str) -> str:
    """On lines, without terminal controls: others write to the bucket too."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)


def one_line(text: str) -> str:
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", "", text)


def quoted(text: str) -> str:
    return "'" + one_line(text).replace("'", r"'\''") + "'"


def pasteable(*words: str) -> str:
    """A command as a shell takes it."""
    return " ".join(re.sub(r"([^A-Za-z0-9_@%+=:./-])", r"\\\1", word) or "''" for word in words)
