"""Who may ask: keys, as OpenAI's clients send them."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request

from ..budgets import BudgetsError
from .errors import ApiError

CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Keys:
    """Keys of which a request must have one, in `Authorization: Bearer KEY`."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, request: Request) -> None:
        """Takes as long whichever of the keys was given, and however much of one.

        Raises:
          ApiError: there is none, or another.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "this server asks for a key; send Authorization: Bearer KEY", headers=CHALLENGE)
        given = _digest(key.strip())
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]  # all, whichever it is
        if not any(fits):
            raise ApiError(401, "this is not one of the server's keys", code="invalid_api_key", headers=CHALLENGE)


def read_keys(path: str) -> Keys:
    """The keys of a file, one a line.

    Raises:
      BudgetsError: it cannot be read, has none, or one that no header can have.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise BudgetsError(f"--api-key-file={path} cannot be read: {reason}; give a file with a key a line") from error
    for number, key in enumerate(lines, 1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise BudgetsError(f"--api-key-file={path}, line {number}: a key is of ASCII characters without spaces")
    if not any(lines):
        raise BudgetsError(f"--api-key-file={path} has no key; write one a line")
    return Keys(filter(None, lines))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
