"""The embedded corpus."""

import fcntl
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from data import corpus, open_dataset

DOCSTRING = """Return the sorted values of the input array.

    Parameters
    ----------
    a : array_like
        Array whose values are to be sorted along the axis.
    n : int, {0, 1}

    Some code follows that is not prose at all::

        for value in the values of the array of words:
            print this and that and more

    >>> words that stand in the example of a doctest
    words that stand in its output and look like prose

    =====  =====
    a      b
    =====  =====

    * A bullet whose text goes on and on in words
      and ends on the line below it.
    """


def test_prose_keeps_sentences_and_drops_code_tables_and_signatures() -> None:
    assert corpus.prose(DOCSTRING) == [
        "Return the sorted values of the input array.",
        "Array whose values are to be sorted along the axis.",
        "Some code follows that is not prose at all:",
        "* A bullet whose text goes on and on in words and ends on the line below it.",
    ]


def test_source_is_parsed_and_never_run(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""What the module is for, in enough words."""\nraise SystemExit\n'
        'class C:\n    """What the class is for, in enough words."""\n'
        '    def f(self):\n        """What the method is for, in enough words."""\n'
    )
    assert corpus.source_documents(str(source), "module") == [
        ("pydoc:module", ["What the module is for, in enough words."]),
        (
            "pydoc:module.C",
            ["What the class is for, in enough words.", "What the method is for, in enough words."],
        ),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all of pytest-xdist's workers, whose folders stand side by side."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "corpus"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            corpus.build(folder)
    return folder


def read(folder: Path, pattern: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob(pattern))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


@pytest.mark.slow
def test_it_is_in_the_format_of_c4(built: Path) -> None:
    assert sorted(path.name for path in built.iterdir()) == [
        "c4-train.00000-of-00002.json.gz",
        "c4-train.00001-of-00002.json.gz",
        "c4-validation.00000-of-00001.json.gz",
    ]
    assert all(set(document) == {"text", "timestamp", "url"} for document in read(built, "c4-*.json.gz"))


@pytest.mark.slow
def test_it_holds_8_megabytes_of_english_without_duplicates(built: Path) -> None:
    texts = [document["text"] for document in read(built, "c4-*.json.gz")]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n")]
    assert sum(len(text.encode()) for text in texts) >= 8_000_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(map(corpus.is_prose, paragraphs))


@pytest.mark.slow
def test_the_split_is_by_the_hash_of_the_text(built: Path) -> None:
    for pattern, expected in (("c4-train*", False), ("c4-validation*", True)):
        for document in read(built, pattern):
            digest = hashlib.blake2b(document["text"].encode(), digest_size=8).digest()
            assert (int.from_bytes(digest, "big") / 2**64 < corpus.VALIDATION_FRACTION) is expected


@pytest.mark.slow
def test_it_comes_back_from_the_records(built: Path, tmp_path: Path, run_prepare, read_split) -> None:
    folder = run_prepare(
        tmp_path / "out", source="c4", input=built / "c4-*.json.gz", vocab_size=1000, sample_bytes=300_000, workers=2
    )
    for split in ("train", "validation"):
        expected = [document["text"] for document in read(built, f"c4-{split}*")]
        assert read_split(open_dataset(folder), split) == expected


def test_too_little_documentation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "corpus_documents", lambda: iter([("pydoc:x", "A few words only.")]))
    with pytest.raises(corpus.CorpusError, match="17 bytes of documentation, fewer than 8,000,000"):
        corpus.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()
