"""The study's text: the embedded corpus with each module's documentation as one document.

The corpus of `make train` has each function's documentation as a document of its own, half of them under 200 bytes and
in no order, so that a context is mostly about something else, and attending to it brings little. Here a document is
all that a module says, in its order: longer than the contexts that are compared, and of one subject.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import corpus, prepare

VALIDATION_PER_MILLE = 60  # of the documents, by a hash of their names
_SAMPLE_BYTES = 2_000_000  # that the tokenizer is trained on
_FILES = {"train": "text-train.jsonl", "validation": "text-validation.jsonl"}


def prepare_dataset(folder: Path, vocab_size: int, record_length: int) -> Path:
    """The dataset's folder within `folder`; what an earlier call has made stays."""
    text, output = folder / "text", folder / "data"
    if not all((text / file).exists() for file in _FILES.values()):
        write_text(text, corpus.corpus_documents())
    prepare.main(
        [
            "--source=jsonl", f"--input={text / _FILES['train']}",
            f"--validation-input={text / _FILES['validation']}", f"--output={output}", f"--vocab-size={vocab_size}",
            f"--record-length={record_length}", f"--sample-bytes={_SAMPLE_BYTES}",
        ]
    )  # fmt: skip
    return output


def write_text(folder: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Writes both splits of the documents, names and texts, as JSON lines, each module's as one."""
    lines: dict[str, list[str]] = {split: [] for split in _FILES}
    for name, text in by_module(documents):
        place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % 1000
        split = "validation" if place < VALIDATION_PER_MILLE else "train"
        lines[split].append(json.dumps({"text": text, "url": name}, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for split, file in _FILES.items():
        partial = folder / f"{file}.partial"
        partial.write_text("".join(lines[split]), encoding="utf-8")
        partial.replace(folder / file)


def by_module(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Documents in a row that are of one module, as one: `pydoc:a.b`, `pydoc:a.b.f` and `pydoc:a.b.C`."""
    texts: list[str] = []
    names: set[str] = set()  # that the module may have: a first document is the module's own, or its first function's
    first = ""
    for url, text in documents:
        parent = url.rpartition(".")[0]
        if parent and parent in names:
            names = {parent}
            texts.append(text)
            continue
        if texts:
            yield first, "\n\n".join(texts)
        first, names, texts = url, {url, parent}, [text]
    if texts:
        yield first, "\n\n".join(texts)
