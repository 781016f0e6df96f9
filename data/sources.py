"""Raw documents from files of several formats, as a stream: memory does not grow with the file."""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec

from data.errors import DataError

SOURCES = {
    "c4": "JSON lines with a `text` field, as allenai/c4 has them",
    "jsonl": "JSON lines with a `text` field",
    "wikitext": "WikiText: a document is an article, from one `= Heading =` to the next",
    "lm1b": "one sentence a line, each a document: lm1b is shuffled, so no sentence goes on in the next",
    "text": "each file is one document",
}
MAX_DOCUMENT_BYTES = 32 << 20
_TOO_LONG = f"over {MAX_DOCUMENT_BYTES >> 20} MiB"
_HEADING = re.compile(r"\s*= (?!= ).*[^= ] =\s*")
# A filesystem's extra, by the protocol of its URLs.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hub"}


@dataclass(frozen=True)
class Document:
    """`line` is the number of its first line (parquet: row) in the file, from 1."""

    line: int
    text: str


@dataclass(frozen=True)
class BadDocument:
    """What cannot be used, and why."""

    line: int
    reason: str


Rows = Iterator[Document | BadDocument]


def in_validation(text: str, fraction: float, purpose: bytes = b"prepare") -> bool:
    """The split of a document by a hash of its text, so that equal texts are always on the same side.

    Another `purpose` gives another split: what one has put aside must not be all that the next would take.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path in it.

    Raises:
      DataError: there is none; the message says what to install.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(url.split("://")[0])
        hint = f"; install the extra: pip install '.[{extra}]'" if extra else ""
        raise DataError(f"cannot open {url}: {error}{hint}") from None


def read_documents(url: str, source: str, progress: Callable[[int], object] = lambda offset: None) -> Rows:
    """The documents of one file: a local path or an fsspec URL; gzip, zstandard, parquet or plain by its name.

    `progress` is told, before each document, how many bytes of the file were read.

    Raises:
      DataError: the file cannot be read to its end; the message says where.
    """
    line = 0
    opened, path = filesystem(url)
    try:
        with opened.open(path, "rb") as raw, _decompressed(url, raw) as stream:
            for document in _READERS[source](stream, url.endswith(".parquet")):
                line = document.line
                progress(raw.tell())
                yield document
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{url}:{line + 1}: reading stopped here: {error or type(error).__name__}") from error


@contextmanager
def _decompressed(url: str, raw: BinaryIO) -> Iterator[BinaryIO]:
    if url.endswith((".gz", ".gzip")):
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast(BinaryIO, io.BufferedReader(cast(Any, stream), 1 << 20))
    elif url.endswith((".zst", ".zstd")):
        with _extra("zstandard", "zstd").ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
            try:
                yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
            except _extra("zstandard", "zstd").ZstdError as error:
                raise OSError(error) from None
    else:
        yield raw


def _extra(module: str, extra: str) -> Any:
    try:
        return __import__(module, fromlist=["*"])
    except ImportError:
        raise DataError(f"{module.split('.')[0]} is not installed: pip install '.[{extra}]'") from None


def _lines(stream: BinaryIO) -> Rows:
    """Each line without its end. One over the limit is bad, and passed over in small pieces."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield BadDocument(number, _TOO_LONG)
            continue
        try:
            yield Document(number, line.removesuffix(b"\n").decode())
        except UnicodeDecodeError:
            yield BadDocument(number, "invalid UTF-8")


def _parquet_rows(stream: BinaryIO) -> Rows:
    """The `text` column, a batch of rows at a time; pyarrow itself holds one row group of it."""
    parquet = _extra("pyarrow.parquet", "parquet")
    try:
        table = parquet.ParquetFile(stream)
        if "text" not in table.schema_arrow.names:
            raise OSError(f"no column `text`, only {', '.join(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    yield BadDocument(number, "no `text`")
                elif len(text) > MAX_DOCUMENT_BYTES:
                    yield BadDocument(number, _TOO_LONG)
                else:
                    yield Document(number, text)
    except _extra("pyarrow", "parquet").ArrowException as error:
        raise OSError(error) from None


def _json_lines(stream: BinaryIO, parquet: bool) -> Rows:
    if parquet:
        yield from _parquet_rows(stream)
        return
    for row in _lines(stream):
        if isinstance(row, BadDocument):
            yield row
        elif row.text.strip():
            yield _json_document(row.line, row.text)


def _json_document(line: int, content: str) -> Document | BadDocument:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return BadDocument(line, "not JSON")
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        return BadDocument(line, "no `text`")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(line, "half of a surrogate pair")
    return Document(line, text)


def _sentences(stream: BinaryIO, parquet: bool) -> Rows:
    for row in _parquet_rows(stream) if parquet else _lines(stream):
        if isinstance(row, BadDocument) or row.text:
            yield row


def _articles(stream: BinaryIO, parquet: bool) -> Rows:
    """WikiText: a heading of the first level stands between blank lines. An article keeps all of its lines."""
    article: list[str] = []
    start, size = 1, 0
    before, last = "", ""
    for row in _parquet_rows(stream) if parquet else _lines(stream):
        if isinstance(row, BadDocument):
            yield row
            continue
        line = row.text.removesuffix("\n")  # rows of parquet have it, lines do not
        if not before.strip() and _HEADING.fullmatch(last) and not line.strip() and any(map(str.strip, article[:-1])):
            yield _article(start, article[:-1], size)
            article, start, size = [last], row.line - 1, len(last) + 1
        size += len(line) + 1
        if size <= MAX_DOCUMENT_BYTES:
            article.append(line)
        before, last = last, line
    if article:
        yield _article(start, article, size)


def _article(start: int, lines: Iterable[str], size: int) -> Document | BadDocument:
    return BadDocument(start, _TOO_LONG) if size > MAX_DOCUMENT_BYTES else Document(start, "\n".join(lines) + "\n")


def _whole_file(stream: BinaryIO, parquet: bool) -> Rows:
    if parquet:
        raise DataError("parquet files hold rows, not one document: use --source jsonl")
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        yield BadDocument(1, f"{_TOO_LONG}: split the file, or use --source lm1b if each line is a document")
        return
    try:
        yield Document(1, content.decode())
    except UnicodeDecodeError:
        yield BadDocument(1, "invalid UTF-8")


_READERS = {"c4": _json_lines, "jsonl": _json_lines, "wikitext": _articles, "lm1b": _sentences, "text": _whole_file}
