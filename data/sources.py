"""Raw documents from files of several formats, as a stream: memory does not grow with the file."""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import fsspec

from data.manifest import DataError

SOURCES = {
    "c4": "JSON lines with a `text` field, as allenai/c4 has them",
    "jsonl": "JSON lines with a `text` field",
    "wikitext": "WikiText: a document is an article, from one `= Heading =` to the next",
    "lm1b": "one sentence a line, each a document: lm1b's sentences are shuffled, so none goes on in the next",
    "text": "each file is one document",
}
MAX_DOCUMENT_BYTES = 32 << 20
_HEADING = re.compile(r"\s*= (?!= ).*[^= ] =\s*")


@dataclass(frozen=True)
class Document:
    """`line` is the number of its first line in the file, from 1."""

    line: int
    text: str


@dataclass(frozen=True)
class BadDocument:
    """What cannot be used, and why."""

    line: int
    reason: str


def in_validation(text: str, fraction: float) -> bool:
    """The split of a document by a hash of its text, so that equal texts are always on the same side."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


def read_documents(url: str, source: str) -> Iterator[Document | BadDocument]:
    """The documents of one file: a local path or an fsspec URL; gzip, zstandard or plain by its name.

    Raises DataError, with file and line, for a file that cannot be read to its end.
    """
    line = 0
    try:
        with fsspec.open(url, "rb") as raw, _decompressed(url, raw) as stream:
            for document in _READERS[source](stream):
                line = document.line
                yield document
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{url}: reading stopped after line {line}: {error or type(error).__name__}") from error


def _decompressed(url: str, raw: BinaryIO) -> BinaryIO:
    if url.endswith((".gz", ".gzip")):
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), 1 << 20))
    return raw


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without its end); None instead of a line over the limit, which is passed over in small pieces."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) <= MAX_DOCUMENT_BYTES:
            yield number, line.removesuffix(b"\n")
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield number, None


_TOO_LONG = f"over {MAX_DOCUMENT_BYTES >> 20} MiB"


def _json_lines(stream: BinaryIO) -> Iterator[Document | BadDocument]:
    for number, line in _lines(stream):
        if line is None:
            yield BadDocument(number, _TOO_LONG)
        elif line.strip():
            yield _json_document(number, line)


def _json_document(number: int, line: bytes) -> Document | BadDocument:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError:
        return BadDocument(number, "invalid UTF-8")
    except (ValueError, RecursionError):
        return BadDocument(number, "not JSON")
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str):
        return BadDocument(number, "no `text`")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(number, "half of a surrogate pair")
    return Document(number, text)


def _decoded_lines(stream: BinaryIO) -> Iterator[Document | BadDocument]:
    for number, line in _lines(stream):
        if line is None:
            yield BadDocument(number, _TOO_LONG)
            continue
        try:
            yield Document(number, line.decode())
        except UnicodeDecodeError:
            yield BadDocument(number, "invalid UTF-8")


def _articles(lines: Iterable[Document | BadDocument]) -> Iterator[Document | BadDocument]:
    """WikiText: a heading of the first level stands alone between blank lines."""
    article: list[str] = []
    start, size, after_blank = 1, 0, True
    for line in lines:
        if isinstance(line, BadDocument):
            yield line
            continue
        if after_blank and _HEADING.fullmatch(line.text) and any(text.strip() for text in article):
            yield Document(start, "\n".join(article) + "\n")
            article, start, size = [], line.line, 0
        article.append(line.text)
        size += len(line.text)
        after_blank = not line.text.strip()
        if size > MAX_DOCUMENT_BYTES:
            yield BadDocument(start, _TOO_LONG)
            article, start, size = [], line.line + 1, 0
    if article:
        yield Document(start, "\n".join(article) + "\n")


def _whole_file(stream: BinaryIO) -> Iterator[Document | BadDocument]:
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        yield BadDocument(1, f"{_TOO_LONG}: split the file, or use --source lm1b if each line is a document")
        return
    try:
        yield Document(1, content.decode())
    except UnicodeDecodeError:
        yield BadDocument(1, "invalid UTF-8")


_READERS = {
    "c4": _json_lines,
    "jsonl": _json_lines,
    "wikitext": lambda stream: _articles(_decoded_lines(stream)),
    "lm1b": _decoded_lines,
    "text": _whole_file,
}
