"""A SentencePiece tokenizer that loses nothing: `decode(encode(text)) == text` for every text without U+2581.

A unigram model, not BPE: on English it packs as many bytes into a token (within 1%) and encodes four times as fast.
Normalization is `identity`, there is no dummy prefix, extra whitespace is kept, runs of spaces may be pieces, and what
has no piece (newlines, tabs and control characters always) falls back to bytes. SentencePiece writes a space as U+2581,
so that one character comes back as a space.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from data.errors import DataError
from data.files import read_file
from data.manifest import TokenizerIdentity

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
SPACE_SYMBOL = "\u2581"
# Longer texts are encoded in chunks, or one document of many megabytes would take gigabytes.
MAX_CHUNK = 1 << 20


class Tokenizer:
    """A SentencePiece model; `encode` and `decode` are safe to call from several threads."""

    def __init__(self, model: bytes):
        """Loads a model from its bytes.

        Raises:
          DataError: `model` is no SentencePiece model, or lacks one of the four special ids.
        """
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError) as error:
            raise DataError(f"not a SentencePiece model: {error}") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        missing = [name for name in ("pad", "unk", "bos", "eos") if getattr(self, f"{name}_id") < 0]
        if missing:
            raise DataError(
                f"the tokenizer has no {', '.join(missing)} id, which the records need; "
                "train one with `python -m data.prepare`, or with --pad_id=0 and the like"
            )

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        model = read_file(Path(path))
        try:
            return cls(model)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @property
    def identity(self) -> TokenizerIdentity:
        digest = hashlib.sha256(self.model).hexdigest()
        return TokenizerIdentity(digest, self.pad_id, self.unk_id, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS."""
        return [token for ids in self.encode_chunks(text) for token in ids]

    def encode_chunks(self, text: str) -> Iterator[list[int]]:
        """What `encode` gives, a part of a long text at a time."""
        return (self._processor.encode(chunk) for chunk in _chunks(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; pad, BOS and EOS have none."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """One id as SentencePiece shows it: a space as U+2581, a byte as <0x0A>, special ids as <s> and the like."""
        return self._processor.id_to_piece(int(token))

    def piece_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the bytes of text that each id stands for, none for special ids, EOS among them.

        Over a document they add up to its UTF-8 bytes, but for those of a U+2581 in it, which counts as a space.
        """
        processor, ids = self._processor, range(self.vocab_size)
        special = {token for token in ids if processor.is_control(token) or processor.is_unknown(token)}
        lengths = [
            0 if token in special else 1 if processor.is_byte(token) else len(_text(self.piece(token)).encode())
            for token in ids
        ]
        return np.array(lengths, np.int32)


def legible(piece: str) -> str:
    """A tokenizer's piece as a reader can see it: spaces as middle dots, bytes as their sign or hexadecimal value."""
    special = {"<s>": "[bos]", "</s>": "[eos]", "<unk>": "[unk]", "<pad>": "[pad]", "<0x0A>": "↵", "<0x09>": "⇥"}
    if piece in special:
        return special[piece]
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return f"[{byte[1]}]"
    return piece.replace("\u2581", "·").replace(" ", "·")


def _text(piece: str) -> str:
    return piece.replace(SPACE_SYMBOL, " ")


def _chunks(text: str) -> Iterator[str]:
    """Cuts before a newline, which no piece of our models crosses, else before a space, else anywhere."""
    start = 0
    while len(text) - start > MAX_CHUNK:
        window = (start + 1, start + MAX_CHUNK)
        cuts = (text.rfind("\n", *window), text.rfind(" ", *window), start + MAX_CHUNK)
        end = next(cut for cut in cuts if cut > start)
        yield text[start:end]
        start = end
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer of exactly `vocab_size` pieces: 4 special, 256 bytes, the rest learned.

    The same texts give the same model.

    Raises:
      DataError: `texts` hold too little for so many pieces, or `vocab_size` leaves none to learn.
    """
    buffer = io.BytesIO()
    reading_errors: list[Exception] = []  # the trainer would turn them into its own

    def lines() -> Iterator[str]:
        try:
            for text in texts:  # lines, because a piece shall not cross one; it skips sentences that hold a tab
                yield from filter(None, re.split(r"[\n\t\r\x00]", text))
        except Exception as error:
            reading_errors.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=buffer,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_CHUNK,
            num_threads=4,  # fixed: the order of summation, and so the model, depends on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if reading_errors:
            raise reading_errors[0] from None
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        hint = "; give more text or a smaller --vocab-size" if "too high" in reason else ""
        raise DataError(f"cannot train a tokenizer of {vocab_size} pieces on this sample: {reason}{hint}") from None
    return Tokenizer(buffer.getvalue())
