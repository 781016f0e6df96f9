"""Text as token ids. Needs the extra `text`, which is sentencepiece."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from .budgets import BudgetsError

TOKENIZER_FILE = "tokenizer.model"


class TextTokenizer:
    """A SentencePiece model.

    Args:
      path: the file, or a folder with a `tokenizer.model`, such as a dataset.

    Attributes:
      bos_id, eos_id: <BOS>, which every prompt starts with, and the token after a whole text.
      vocab_size: tokens that have a text; a model may have more.

    Raises:
      BudgetsError: there is none, it cannot be read, or sentencepiece is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path)
        file = file / TOKENIZER_FILE if file.is_dir() else file
        try:
            sentencepiece = importlib.import_module("sentencepiece")
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(file.read_bytes())
        except ImportError as error:
            raise BudgetsError("sentencepiece is missing: pip install 'inference-budget[text]'") from error
        except (OSError, RuntimeError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "not a SentencePiece model"
            raise BudgetsError(f"{file}: {reason}; give a tokenizer.model, or a dataset that has one") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise BudgetsError(f"{file} has no <BOS> or no <EOS>; give the tokenizer that the model was trained with")

    def encode(self, text: str) -> list[int]:
        """A prompt: <BOS>, and the ids of the text."""
        return [self.bos_id, *self._processor.encode(text)]

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that tokens add to that of a prompt; some tokenizers drop the space that a text begins with."""
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.decode(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without that of special ones and of those beyond the tokenizer's."""
        return self._processor.decode([token for token in tokens if token < self.vocab_size])

    def pieces(self) -> list[bytes]:
        """The bytes of text that each token stands for; special ones have none."""
        return [self._bytes(token) for token in range(self.vocab_size)]

    def _bytes(self, token: int) -> bytes:
        processor = self._processor
        if processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return processor.decode([token]).encode()
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace("\u2581", " ").encode()  # SentencePiece's sign for a space
