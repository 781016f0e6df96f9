"""What turns text into ids and back, and the SentencePiece models that `data.prepare` trains.

These lose nothing: `decode(encode(text)) == text` for every text without U+2581. A unigram model, not BPE: on English
it packs as many bytes into a token (within 1%) and encodes four times as fast. Normalization is `identity`, there is no
dummy prefix, extra whitespace is kept, runs of spaces may be pieces, and what has no piece (newlines, tabs and control
characters always) falls back to bytes. SentencePiece writes a space as U+2581, so that one character comes back as a
space.
"""

import abc
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from data.errors import DataError
from data.manifest import TOKENIZER_FILE, TokenizerIdentity

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
SPACE_SYMBOL = "\u2581"
# Longer texts are encoded in chunks, or one document of many megabytes would take gigabytes.
MAX_CHUNK = 1 << 20


class Tokenizer(abc.ABC):
    """What all of them do; safe to use from several threads. `load_tokenizer` reads one.

    Attributes:
      files: the bytes of its files by their names, first the one that says of which kind it is.
      vocab_size: ids, 0 .. vocab_size - 1.
      pad_id: the id that stands where there is no token, and which no text has.
      unk_id: the id of what has no piece, -1 if there is none.
      bos_id, eos_id: the ids before a text and after each document.
    """

    files: dict[str, bytes]
    vocab_size: int
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int

    @property
    def identity(self) -> TokenizerIdentity:
        digest = hashlib.sha256(b"".join(self.files.values())).hexdigest()
        return TokenizerIdentity(digest, self.pad_id, self.unk_id, self.bos_id, self.eos_id, next(iter(self.files)))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS."""
        return [token for chunk in self.chunks(text) for token in self.encode_chunk(chunk)]

    def chunks(self, text: str) -> Iterator[str]:
        """A long text in parts, whose ids one after the other are the text's."""
        return _chunks(text)

    @abc.abstractmethod
    def encode_chunk(self, chunk: str) -> list[int]:
        """The ids of one of the parts."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; pad, BOS and EOS have none."""

    @abc.abstractmethod
    def changes(self, chunk: str, ids: Sequence[int]) -> bool:
        """Whether a part of a text does not come back as it was from its ids."""

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """One id as SentencePiece shows it: a space as U+2581, a byte as <0x0A>, special ids as <s> and the like."""

    @abc.abstractmethod
    def piece_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the bytes of text that each id stands for, none for special ids, EOS among them."""

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to that of `prompt`; some tokenizers drop a text's first space.

        Ids beyond the vocabulary, which a model may have, are left out.
        """
        known = [token for token in ids if token < self.vocab_size]
        before, whole = self.decode(prompt), self.decode([*prompt, *known])
        return whole[len(before) :] if whole.startswith(before) else self.decode(known)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model: bytes):
        """Loads a model from its bytes.

        Raises:
          DataError: `model` is no SentencePiece model, or lacks one of the four special ids.
        """
        self.model, self.files = model, {TOKENIZER_FILE: model}
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError) as error:
            raise DataError(f"not a SentencePiece model: {error}") from None
        self.vocab_size = self._processor.vocab_size()
        self.pad_id = self._processor.pad_id()
        self.unk_id = self._processor.unk_id()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        missing = [name for name in ("pad", "unk", "bos", "eos") if getattr(self, f"{name}_id") < 0]
        if missing:
            raise DataError(
                f"the tokenizer has no {', '.join(missing)} id, which the records need; "
                "train one with `python -m data.prepare`, or with --pad_id=0 and the like"
            )

    def encode_chunk(self, chunk: str) -> list[int]:
        return self._processor.encode(chunk)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def changes(self, chunk: str, ids: Sequence[int]) -> bool:
        return SPACE_SYMBOL in chunk

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(int(token))

    def piece_bytes(self) -> np.ndarray:
        """As in `Tokenizer`. Over a document they add up to its UTF-8 bytes, but for those of a U+2581 in it, which
        counts as a space.
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
    return piece.replace("\u2581", "·").replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
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
    return SentencePieceTokenizer(buffer.getvalue())
