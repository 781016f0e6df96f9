"""What a prepared dataset is: `manifest.json`, beside the tokenizer and the ArrayRecord shards it describes."""

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
MAX_UINT16_VOCAB = 65_536


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the folder, its records, its size in bytes and the CRC-32 of those."""

    file: str
    records: int
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Split:
    """`tokens` counts one EOS per document and no padding; `text_bytes` is UTF-8 before tokenization."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class TokenizerIdentity:
    """The SHA-256 of the tokenizer's files, its special ids, and the name of the first file."""

    sha256: str
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    file: str = TOKENIZER_FILE  # or TOKENIZER_JSON


@dataclass(frozen=True)
class Manifest:
    """A dataset's contents. `source` says where they came from (options, inputs) and identifies nothing."""

    source: dict[str, Any]
    tokenizer: TokenizerIdentity
    vocab_size: int
    record_length: int
    splits: dict[str, Split]

    @property
    def shards(self) -> list[Shard]:
        """The shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def record_dtype(self) -> str:
        """The numpy dtype of a token in a record, little-endian."""
        return record_dtype(self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Identifies every token and its place: equal for equal records in equal shards, wherever they came from."""
        content = {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer.sha256,
            "record_length": self.record_length,
            "record_dtype": self.record_dtype,
            "splits": {
                name: [split.tokens, [[shard.records, shard.crc32] for shard in split.shards]]
                for name, split in self.splits.items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        splits = {
            name: {
                "documents": split.documents,
                "records": split.records,
                "tokens": split.tokens,
                "text_bytes": split.text_bytes,
                "bytes_per_token": round(split.bytes_per_token, 4),
                "shards": [dataclasses.asdict(shard) for shard in split.shards],
            }
            for name, split in self.splits.items()
        }
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "record_length": self.record_length,
            "record_dtype": self.record_dtype,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "splits": splits,
            "source": self.source,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads what `to_json` wrote.

        Raises:
          DataError: `text` is not a manifest of this version, or was changed by hand.
        """
        try:
            content = json.loads(text)
            if content["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"format version {content['format_version']}, not this release's {FORMAT_VERSION}; prepare again"
                )
            splits = {
                name: Split(
                    split["documents"],
                    split["tokens"],
                    split["text_bytes"],
                    tuple(Shard(**shard) for shard in split["shards"]),
                )
                for name, split in content["splits"].items()
            }
            for name, split in splits.items():
                _check_names(name, [shard.file for shard in split.shards])
            identity = TokenizerIdentity(**content["tokenizer"])
            if identity.file not in (TOKENIZER_FILE, TOKENIZER_JSON):
                raise DataError(f"its tokenizer is {identity.file!r}, not {TOKENIZER_FILE} or {TOKENIZER_JSON}")
            manifest = cls(
                content["source"],
                identity,
                content["vocab_size"],
                content["record_length"],
                splits,
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a dataset manifest ({type(error).__name__}: {error})") from None
        if content.get("record_dtype") != manifest.record_dtype:
            raise DataError(
                f"vocab_size {manifest.vocab_size} needs records of {manifest.record_dtype}, "
                f"but record_dtype is {content.get('record_dtype')}; prepare again"
            )
        if content.get("fingerprint") != manifest.fingerprint:
            raise DataError(
                "its fingerprint does not match its contents: it was changed after it was written; prepare again"
            )
        return manifest


def _check_names(split: str, names: list[str]) -> None:
    """The fingerprint leaves names out, so that a renamed dataset stays the same; but in their order they stand."""
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
            raise DataError(f"the shard's name {name!r} in split {split!r} is no plain file name; prepare again")
    for name, following in itertools.pairwise(names):
        if name >= following:
            raise DataError(f"shard {following} stands behind {name} in split {split!r}, out of order; prepare again")


def record_dtype(vocab_size: int) -> str:
    """Little-endian uint16, or uint32 for a vocabulary above 65,536 ids."""
    return "<u2" if vocab_size <= MAX_UINT16_VOCAB else "<u4"


def file_crc32(path: Path, progress: Callable[[int], object] = lambda count: None) -> int:
    """The CRC-32 of a file; `progress` is told the bytes of each read."""
    crc32 = 0
    with path.open("rb") as stream:
        while content := stream.read(8 << 20):
            crc32 = zlib.crc32(content, crc32)
            progress(len(content))
    return crc32
