"""Tokenizers of pretrained models: a `tokenizer.json` of Hugging Face's package tokenizers.

Ids, pieces and their bytes are read off the file itself, so that training needs no more than this repository; only to
turn text into ids, and ids into text, the package must be there. What a text says is text: `<s>` in it never becomes
the special id.
"""

import functools
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.manifest import TOKENIZER_JSON
from data.tokenizer import SPACE_SYMBOL, Tokenizer

CONFIG_FILE = "tokenizer_config.json"


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, with the special tokens that the `tokenizer_config.json` beside it names.

    Where there is no BOS, EOS is in its place. `pad_id` is the padding token or, if that is EOS, the unknown one,
    another special one, or BOS: what no text has, since it does not count for the loss.
    """

    def __init__(self, files: Mapping[str, bytes]):
        """Reads both files, given by their names.

        Raises:
          DataError: they are no such files, or of a kind that is not known here.
        """
        self.files = {name: files[name] for name in (TOKENIZER_JSON, CONFIG_FILE)}
        content, self._config = (_parsed(name, text) for name, text in self.files.items())
        try:
            self._pieces = _pieces(content)
            added = content.get("added_tokens") or []
            self._special = {token["id"] for token in added if token.get("special")}
            self._as_written = {token["id"] for token in added}  # whose piece is the text itself
            self._model: dict[str, Any] = content["model"]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{TOKENIZER_JSON} has no vocabulary ({type(error).__name__}: {error})") from None
        self._byte_level = _is_byte_level(content.get("decoder"))
        self.vocab_size = len(self._pieces)
        self._set_special_ids()

    def _set_special_ids(self) -> None:
        named = {name: self._named(f"{name}_token") for name in ("pad", "unk", "bos", "eos")}
        if named["eos"] is None:
            raise DataError(f"{CONFIG_FILE} names no eos_token, which ends documents; name one of {TOKENIZER_JSON}")
        self.eos_id = named["eos"]
        self.bos_id = self.eos_id if named["bos"] is None else named["bos"]
        self.unk_id = -1 if named["unk"] is None else named["unk"]
        self._special |= {token for token in named.values() if token is not None}
        self._no_text = self._special - {self.unk_id}
        never_unknown = self._byte_level or self._model.get("byte_fallback")
        others = sorted(self._special - {self.bos_id, self.unk_id})
        choices = [named["pad"], named["unk"] if never_unknown else None, *others, self.bos_id]
        pad = next((token for token in choices if token not in (None, self.eos_id)), None)
        if pad is None:
            raise DataError(
                f"{TOKENIZER_JSON} has no id that marks padding; add a special token, and name it pad_token"
            )
        self.pad_id = pad

    def _named(self, name: str) -> int | None:
        token = self._config.get(name)
        piece = token.get("content") if isinstance(token, dict) else token
        if piece is None:
            return None
        if piece not in self._pieces:
            raise DataError(f"{CONFIG_FILE}: {name} is {piece!r}, which {TOKENIZER_JSON} does not have")
        return len(self._pieces) - 1 - self._pieces[::-1].index(piece)  # an added token goes before a piece of its name

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            package = importlib.import_module("tokenizers")
        except ImportError:
            raise DataError(
                f"{TOKENIZER_JSON} needs the package tokenizers to read and write text, which is not installed; "
                "install it, or the extra hf"
            ) from None
        try:
            tokenizer = package.Tokenizer.from_str(self.files[TOKENIZER_JSON].decode())
        except Exception as error:  # the package's own have no class
            raise DataError(f"{TOKENIZER_JSON} cannot be read: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as any text
        if self._model.get("dropout"):
            tokenizer.model.dropout = None  # which draws at random
        for token in sorted(self._no_text):
            text = self._pieces[token]
            if self._no_text & set(tokenizer.encode(text, add_special_tokens=False).ids):
                raise DataError(f"{TOKENIZER_JSON} takes the text {text!r} for a special token; such ones are not read")
        return tokenizer

    @functools.cached_property
    def _joins(self) -> bool:
        """Whether a text may be cut, and the ids of its parts decoded together."""
        ids = [token for part in ("ab", "cd") for token in self.encode_chunk(part)]
        return self.decode(ids) == "abcd"

    def chunks(self, text: str) -> Iterator[str]:
        return super().chunks(text) if self._joins else iter([text])

    def encode_chunk(self, chunk: str) -> list[int]:
        return self._tokenizer.encode(chunk, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def changes(self, chunk: str, ids: Sequence[int]) -> bool:
        return self.decode(ids) != chunk

    def piece(self, token: int) -> str:
        token = int(token)
        shown = {self.unk_id: "<unk>", self.pad_id: "<pad>", self.eos_id: "</s>", self.bos_id: "<s>"}
        if token in shown or token in self._as_written or not self._byte_level:
            return shown.get(token, self._pieces[token])
        content = self._bytes(token)
        if len(content) == 1 and not 32 <= content[0] < 127:
            return f"<0x{content[0]:02X}>"
        return content.decode(errors="backslashreplace").replace(" ", SPACE_SYMBOL)

    def piece_bytes(self) -> np.ndarray:
        """As in `Tokenizer`. Over a document they add up to the UTF-8 bytes of the text that comes back, and a byte for
        the space that some tokenizers put before a text.
        """
        ids = range(self.vocab_size)
        return np.array([0 if token in self._special else len(self._bytes(token)) for token in ids], np.int32)

    def _bytes(self, token: int) -> bytes:
        piece = self._pieces[token]
        if token in self._as_written:
            return piece.encode()
        if self._byte_level:
            return bytes(_BYTES[character] for character in piece)
        if self._model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE_SYMBOL, " ").encode()


def _parsed(name: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{name} holds no object")
    return content


def _pieces(content: dict[str, Any]) -> list[str]:
    """The pieces by their ids; an id between them that has none is empty."""
    model = content["model"]
    if (kind := model.get("type", "BPE")) not in ("BPE", "Unigram"):
        raise DataError(f"{TOKENIZER_JSON}: model.type is {kind!r}; only BPE and Unigram are read")
    vocab = model["vocab"]
    by_id = dict(enumerate(piece for piece, _ in vocab)) if kind == "Unigram" else {n: p for p, n in vocab.items()}
    by_id |= {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    return [by_id.get(token, "") for token in range(max(by_id) + 1)]


def _is_byte_level(decoder: Any) -> bool:
    """Whether a character of a piece stands for a byte; else one is itself, and U+2581 a space.

    Raises:
      DataError: pieces are something else.
    """
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return True
    if not kinds & {"Metaspace", "ByteFallback"}:
        found = ", ".join(sorted(map(str, kinds))) or "none"
        raise DataError(f"{TOKENIZER_JSON}: its decoder is {found}; ByteLevel, Metaspace and ByteFallback are read")
    return False


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for: itself if it can be seen, else one of 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = sorted(set(range(256)) - set(seen))
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(unseen)}


_BYTES = _byte_alphabet()
