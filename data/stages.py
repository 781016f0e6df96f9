"""The two stages of preparing text, each a function of one task that any runner can call anywhere, any number of times.

`tokenize_file` turns one input file into token files (one a split) and a receipt; `write_shard` copies a range of those
tokens into one ArrayRecord shard. Both write aside and rename, the receipt last, so that what exists is complete, and
both give the same bytes whoever runs them.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import numpy as np
from array_record.python import array_record_module

from data.errors import DataError, WorkError
from data.folder import Folder
from data.manifest import Shard, file_crc32, record_dtype
from data.sources import BadDocument, in_validation, read_documents
from data.tokenizer import Tokenizer
from data.tokenizer_files import read_tokenizer
from data.workers import Position

# Uncompressed, since ids hardly compress and reading is what must be fast. A reader keeps 8 bytes of index for each
# group and copies them at each read: at one record a group, 1,024 shards of 512 MB would take 1.2 GB and eight times as
# long to open and to read. A group of eight (32 KiB) is still one small read.
_WRITER_OPTIONS = "group_size:8,uncompressed"
_BUFFER_BYTES = 8 << 20
_REPORTED_BAD_DOCUMENTS = 20


@dataclass(frozen=True)
class SplitCount:
    """What one file gave to one split. `tokens` counts one EOS per document, `text_bytes` is UTF-8."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Receipt:
    """What became of one input file. `bad` lists the first bad documents as (line, reason)."""

    splits: dict[str, SplitCount]
    bad_documents: int
    bad: list[tuple[int, str]]
    changed_documents: int  # those that do not come back as they were

    @classmethod
    def from_json(cls, content: bytes) -> "Receipt":
        receipt = json.loads(content)
        receipt["splits"] = {name: SplitCount(**count) for name, count in receipt["splits"].items()}
        receipt["bad"] = [tuple(bad) for bad in receipt["bad"]]
        return cls(**receipt)


@dataclass(frozen=True)
class FileTask:
    """Input number `index`, of `size` bytes. Where `split` is None a hash sends `validation_fraction` to validation."""

    work: Folder
    index: int
    url: str
    size: int
    source: str
    split: str | None
    validation_fraction: float

    @property
    def receipt_file(self) -> str:
        return f"tokens/{self.index:05d}.json"

    def token_file(self, split: str) -> str:
        return f"tokens/{self.index:05d}.{split}.tokens"

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class TokenRange:
    """`tokens` tokens of a token file, from number `start`."""

    file: str
    start: int
    tokens: int


@dataclass(frozen=True)
class ShardTask:
    """`records` records, from the concatenation of `ranges`, padded at the end with the tokenizer's pad id."""

    work: Folder
    output: Folder
    file: str
    ranges: tuple[TokenRange, ...]
    records: int
    record_length: int

    @property
    def receipt_file(self) -> str:
        return f"shards/{self.file}.json"

    @property
    def size(self) -> int:
        """The size of the shard in records."""
        return self.records

    def __str__(self) -> str:
        return self.file


@cache
def _load_tokenizer(work: Folder) -> Tokenizer:
    tokenizer = read_tokenizer(work)
    if tokenizer is None:
        raise DataError(f"{work.url} has no tokenizer; prepare again")
    return tokenizer


def tokenize_file(task: FileTask, position: Position) -> None:
    """Turns an input file into tokens: stage one. `position` follows the line and the bytes read.

    Raises:
      DataError: the input cannot be read.
    """

    def at_byte(offset: int) -> None:
        position[1] = offset

    tokenizer = _load_tokenizer(task.work)
    dtype = record_dtype(tokenizer.vocab_size)
    names = [task.split] if task.split else ["train", "validation"]
    counts = {name: [0, 0, 0] for name in names}
    bad: list[tuple[int, str]] = []
    bad_documents = changed_documents = 0
    with ExitStack() as stack:
        paths = [stack.enter_context(task.work.writing(task.token_file(name))) for name in names]
        files = {
            name: stack.enter_context(path.open("wb", _BUFFER_BYTES)) for name, path in zip(names, paths, strict=True)
        }
        for document in read_documents(task.url, task.source, at_byte):
            position[0] = document.line
            if isinstance(document, BadDocument):
                bad_documents += 1
                if len(bad) < _REPORTED_BAD_DOCUMENTS:
                    bad.append((document.line, document.reason))
                continue
            text = document.text
            split = task.split or ("validation" if in_validation(text, task.validation_fraction) else "train")
            count = counts[split]
            changed = False
            for chunk in tokenizer.chunks(text):
                ids = tokenizer.encode_chunk(chunk)
                files[split].write(np.array(ids, dtype).tobytes())
                count[1] += len(ids)
                changed |= tokenizer.changes(chunk, ids)
            files[split].write(np.array([tokenizer.eos_id], dtype).tobytes())
            count[0] += 1
            count[1] += 1
            count[2] += len(text.encode())
            changed_documents += changed
    receipt = Receipt({name: SplitCount(*counts[name]) for name in names}, bad_documents, bad, changed_documents)
    task.work.write(task.receipt_file, json.dumps(dataclasses.asdict(receipt)).encode())


def write_shard(task: ShardTask, position: Position) -> None:
    """Writes a shard from its ranges of tokens: stage two. `position` follows the records written.

    The shard is read back for its checksum, and its records are counted, before it appears.
    """
    tokenizer = _load_tokenizer(task.work)
    dtype = np.dtype(record_dtype(tokenizer.vocab_size))
    pad = np.array([tokenizer.pad_id], dtype).tobytes()
    with task.output.writing(task.file) as path:
        try:
            _write_records(str(path), _records(task, dtype.itemsize, pad), position)
        except RuntimeError as error:
            raise WorkError(f"cannot write {task.file}: {error}; is there room? Run the same command again") from None
        reader = array_record_module.ArrayRecordReader(str(path))
        if not reader.ok() or reader.num_records() != task.records:
            raise DataError(f"{task.file} came out with {reader.num_records()} records instead of {task.records}")
        reader.close()
        shard = Shard(task.file, task.records, path.stat().st_size, file_crc32(path))
    task.work.write(task.receipt_file, json.dumps(dataclasses.asdict(shard)).encode())


def _write_records(path: str, records: Iterator[bytes], position: Position) -> None:
    writer = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)
    for record in records:
        writer.write(record)
        position[1] += 1
    writer.close()


def _records(task: ShardTask, itemsize: int, pad: bytes) -> Iterator[bytes]:
    size = task.record_length * itemsize
    buffer = b""
    for content in _token_bytes(task, itemsize):
        buffer += content
        whole = len(buffer) - len(buffer) % size
        for start in range(0, whole, size):
            yield buffer[start : start + size]
        buffer = buffer[whole:]
    if buffer:
        yield buffer + pad * ((size - len(buffer)) // itemsize)


def _token_bytes(task: ShardTask, itemsize: int) -> Iterator[bytes]:
    for part in task.ranges:
        end = (part.start + part.tokens) * itemsize
        for start in range(part.start * itemsize, end, _BUFFER_BYTES):
            yield task.work.read(part.file, start, min(start + _BUFFER_BYTES, end))
