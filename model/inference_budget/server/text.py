"""Tokens back to text as they come, which may be a byte of a character at a time."""

import codecs
from collections.abc import Sequence

# One sign for each byte of what is no UTF-8, as SentencePiece has it.
_UNREADABLE = {0xDC00 + byte: 0xFFFD for byte in range(0x80, 0x100)}


class TextStream:
    """The text of one sequence, token by token, up to and without the first of some stop strings.

    What `take` gives, one after the other, is the decoded whole. A character that has not all its bytes yet waits for
    them, and so does what may be the beginning of a stop string.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        self._pieces, self._stops = pieces, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._taken, self._waiting = 0, ""
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters so far, of those that have all their bytes."""
        return self._taken + len(self._waiting)

    def add(self, token: int) -> None:
        """Takes in the next token; one that the tokenizer does not have is no text.

        Bytes before and after a token without text make no character together, as with SentencePiece.
        """
        piece = self._pieces[token] if token < len(self._pieces) else b""
        self._append(self._decoder.decode(piece, final=not piece))

    def take(self) -> str:
        """The text that has not been given yet and will not change any more."""
        held = 0 if self.stopped else max((self._begun(stop) for stop in self._stops), default=0)
        text, self._waiting = self._waiting[: len(self._waiting) - held], self._waiting[len(self._waiting) - held :]
        self._taken += len(text)
        return text

    def close(self) -> None:
        """There is no next token: what waits for one is text as it is."""
        if not self.stopped:
            self._append(self._decoder.decode(b"", final=True))
            self._stops = ()

    def _append(self, text: str) -> None:
        self._waiting += text.translate(_UNREADABLE)
        ends = [at for stop in self._stops if (at := self._waiting.find(stop)) >= 0]
        if ends:
            self._waiting, self.stopped = self._waiting[: min(ends)], True

    def _begun(self, stop: str) -> int:
        """How many characters at the end of the text are the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._waiting))
        return next((n for n in range(longest, 0, -1) if self._waiting.endswith(stop[:n])), 0)
