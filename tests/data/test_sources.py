"""Reading documents: every format, and every kind of bad document, by its line."""

import gzip
import json
from pathlib import Path

import pytest

from data import DataError, sources
from data.sources import BadDocument, Document, read_documents


def read(path: Path, source: str = "jsonl") -> list[Document | BadDocument]:
    return list(read_documents(str(path), source))


def json_line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def test_json_lines_plain_and_gzipped(tmp_path: Path) -> None:
    content = json_line("first\nline") + b"\n" + json_line(" second ")
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(content))
    expected = [Document(1, "first\nline"), Document(3, " second ")]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json.gz") == expected


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(json_line("first")), zstandard.compress(json_line("second"))]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.zst") == [Document(1, "first"), Document(2, "second")]


def test_bad_json_lines_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 200)
    lines = [
        json_line("good"),
        b"{not json\n",
        b'{"txt": "no text"}\n',
        b'{"text": 3}\n',
        b"[]\n",
        b'{"text": "\xff"}\n',
        b'{"text": "\\ud800"}\n',
        json_line("x" * 500),
        json_line("x" * 3_000_000),
        json_line("good at the end"),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines).removesuffix(b"\n"))
    found = read(tmp_path / "a.jsonl")
    assert [item.line for item in found] == list(range(1, 11))
    assert [getattr(item, "reason", "") for item in found] == [
        "",
        "not JSON",
        "no `text`",
        "no `text`",
        "no `text`",
        "invalid UTF-8",
        "half of a surrogate pair",
        "over 32 MiB",
        "over 32 MiB",
        "",
    ]


def test_deeply_nested_json_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[" * 200_000 + b"\n" + json_line("good"))
    assert read(tmp_path / "a.jsonl") == [BadDocument(1, "not JSON"), Document(2, "good")]


WIKITEXT = (
    " \n = First = \n \n Some text . \n \n = = Section = = \n \n"
    " = 2 + 3 = \n x = 5 = \n \n = Second article = \n \n More text . \n"
)


def test_wikitext_articles_hold_all_their_lines(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text(WIKITEXT)
    documents = read(tmp_path / "wiki.train.tokens", "wikitext")
    assert [document.line for document in documents] == [1, 11]
    assert documents[1].text == " = Second article = \n \n More text . \n"
    assert "".join(document.text for document in documents) == WIKITEXT


def test_wikitext_of_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = ["", " = First = \n", "", " Some text . \n", "", " = Second = \n", "", " More . \n"]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path / "a.parquet", "wikitext")] == [
        "\n = First = \n\n Some text . \n\n",
        " = Second = \n\n More . \n",
    ]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["first", None, "third"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Document(1, "first"), BadDocument(2, "no `text`"), Document(3, "third")]


@pytest.mark.parametrize("content", [b"not parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_damaged_parquet_is_an_error(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet:1: reading stopped here"):
        read(tmp_path / "a.parquet")


def test_lm1b_sentences_are_documents(tmp_path: Path) -> None:
    (tmp_path / "news.en-00001-of-00100").write_text("One sentence .\nAnother one .\n\n")
    found = read(tmp_path / "news.en-00001-of-00100", "lm1b")
    assert found == [Document(1, "One sentence ."), Document(2, "Another one .")]


def test_text_is_one_document_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("All of it\n\n  as it stands\n")
    assert read(tmp_path / "a.txt", "text") == [Document(1, "All of it\n\n  as it stands\n")]
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 5)
    assert isinstance(read(tmp_path / "a.txt", "text")[0], BadDocument)


def test_a_truncated_gzip_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    lines = [json_line(f"text {number} {number**7}") for number in range(5000)]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"".join(lines))[:-200])
    with pytest.raises(DataError, match=r"a\.json\.gz:\d+: reading stopped here: Compressed file ended"):
        read(tmp_path / "a.json.gz")


def test_a_filesystem_that_is_not_installed_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(url: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("fsspec.core.url_to_fs", not_installed)
    with pytest.raises(DataError, match=r"Please install gcsfs; install the extra: pip install '\.\[gcs\]'"):
        next(read_documents("gs://bucket/a.jsonl", "jsonl"))


def test_an_unknown_protocol_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot open nothing://x"):
        next(read_documents("nothing://x/a.jsonl", "jsonl"))
