"""Tokenizers of pretrained models: what a text says stays text, and datasets made with them are like any other."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import DataError, TrainBatches, load_tokenizer, open_dataset
from data.tokenizer import MAX_CHUNK, legible
from tests.data.conftest import ODD_TEXTS, SENTENCE, write_json_lines
from tests.support.tokenizers import BYTE_LEVEL, SPACES, make_tokenizer

pytest.importorskip("tokenizers")

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A new folder of `make_tokenizer`."""
    return lambda kind=BYTE_LEVEL, **changes: make_tokenizer(tmp_path_factory.mktemp(kind), kind, **changes)


@pytest.fixture(scope="module", params=[BYTE_LEVEL, SPACES])
def folder(request, make: Make) -> Path:
    return make(request.param)


def test_odd_texts_come_back_and_what_looks_special_in_them_is_text(folder):
    tokenizer = load_tokenizer(folder)
    texts = [*ODD_TEXTS, "<|begin|><|end|> <|pad|><s></s><unk> <0x41>"]
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not tokenizer.changes(text, ids)
        assert not special & set(ids)


def test_a_token_that_was_added_as_text_is_one_and_what_does_not_come_back_is_told(make):
    for kind, comes_back in ((BYTE_LEVEL, True), (SPACES, False)):  # which puts a space behind such a token
        tokenizer, text = load_tokenizer(make(kind)), "<think> words"
        ids = tokenizer.encode(text)
        assert (tokenizer.decode(ids) == text) is comes_back is not tokenizer.changes(text, ids)
        assert tokenizer.piece(ids[0]) == "<think>" and tokenizer.piece_bytes()[ids[0]] == 7


def test_pieces_and_their_bytes_are_read_without_the_package(folder, monkeypatch):
    texts = [text for text in ODD_TEXTS if text]
    ids = [load_tokenizer(folder).encode(text) for text in texts]
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    tokenizer = load_tokenizer(folder)
    spaces = 0 if folder.name.startswith(BYTE_LEVEL) else 1  # what is put before each text
    lengths = tokenizer.piece_bytes()
    assert len(lengths) == tokenizer.vocab_size
    assert not lengths[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]].any()
    for text, tokens in zip(texts, ids, strict=True):
        assert lengths[tokens].sum() == len(text.encode()) + spaces
    assert legible(tokenizer.piece(tokenizer.bos_id)) == "[bos]"
    with pytest.raises(DataError, match=r"needs the package tokenizers .* the extra hf"):
        tokenizer.encode("words")


def test_a_dataset_made_with_it_is_the_same_with_any_workers_and_says_whose_it_is(folder, tmp_path, run_prepare):
    texts = [SENTENCE, *ODD_TEXTS, "one <|end|> two</s> three"] * 9
    for name in ("train", "more", "validation"):
        write_json_lines(tmp_path / f"{name}.json.gz", texts)
    paths = [
        run_prepare(tmp_path / f"with{workers}", input=tmp_path / "*.json.gz", tokenizer=folder, workers=workers)
        for workers in (1, 3)
    ]
    one, other = (open_dataset(path) for path in paths)
    assert one.manifest.fingerprint == other.manifest.fingerprint
    said = json.loads((paths[0] / "manifest.json").read_text())
    assert said["tokenizer"]["file"] == "tokenizer.json" and said["source"]["changed_documents"] == 0
    tokenizer = one.tokenizer()
    assert said["vocab_size"] == tokenizer.vocab_size and said["tokenizer"]["eos_id"] == tokenizer.eos_id
    tokens = np.concatenate(one.read_records("validation", range(one.manifest.splits["validation"].records)))
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert [tokenizer.decode(part) for part in np.split(tokens, ends[:-1] + 1)] == texts
    batch = TrainBatches(one, context_length=32, batch_size=4, seed=0).rows(0, range(4))
    assert (batch["inputs"][:, 0] == tokenizer.bos_id).all() and batch["bytes"].sum() > 0


def test_long_texts_are_cut_only_where_that_changes_nothing(make):
    text = "word " * (MAX_CHUNK // 4)
    assert len(list(load_tokenizer(make(BYTE_LEVEL)).chunks(text))) == 2
    assert len(list(load_tokenizer(make(SPACES)).chunks(text))) == 1  # a part would begin with a space too many


def test_a_continuation_keeps_the_space_that_a_text_alone_would_lose(make):
    tokenizer = load_tokenizer(make(SPACES))
    prompt, drawn = tokenizer.encode("old words"), tokenizer.encode("fade")
    assert tokenizer.decode(drawn) == "fade"
    assert tokenizer.continuation([tokenizer.bos_id, *prompt], [*drawn, 10_000]) == " fade"


@pytest.mark.parametrize(
    ("config", "bos", "pad"),
    [
        ({"bos_token": None}, "<|end|>", "<|pad|>"),
        ({"pad_token": "<|end|>"}, "<|begin|>", "<|pad|>"),  # EOS counts for the loss: another special one
        ({"bos_token": "<|pad|>", "pad_token": None}, "<|pad|>", "<|begin|>"),
    ],
)
def test_ids_that_a_config_does_not_name_are_chosen_so_that_no_text_has_them(make, config, bos, pad):
    tokenizer = load_tokenizer(make(config=config))
    pieces = [token["content"] for token in json.loads(tokenizer.files["tokenizer.json"])["added_tokens"]]
    assert (pieces[tokenizer.bos_id], pieces[tokenizer.pad_id], pieces[tokenizer.eos_id]) == (bos, pad, "<|end|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"eos_token": None}}, "names no eos_token, which ends documents"),
        ({"config": {"eos_token": "<|gone|>"}}, r"eos_token is '<\|gone\|>', which tokenizer.json does not have"),
        ({"content": {"model": {"type": "WordPiece", "vocab": {}}}}, "model.type is 'WordPiece'"),
        ({"content": {"model": {"type": "BPE"}}}, "has no vocabulary"),
        ({"content": {"decoder": {"type": "WordPiece"}}}, "its decoder is WordPiece"),
    ],
)
def test_what_cannot_be_read_is_named(make, changes, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(make(**changes))


def test_a_file_alone_or_damaged_is_an_error_that_names_it(make, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((make() / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
