"""The tokenizer gives every text back."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, Dataset, Tokenizer, load_tokenizer
from data import tokenizer as tokenizer_module
from data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(dataset: Dataset) -> Tokenizer:
    return dataset.tokenizer()


def test_odd_texts_come_back(tokenizer: Tokenizer, odd_texts: list[str]) -> None:
    assert [tokenizer.decode(tokenizer.encode(text)) for text in odd_texts] == odd_texts


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_exception_is_the_space_symbol(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_special_ids_are_fixed_and_never_come_from_text(tokenizer: Tokenizer) -> None:
    assert (PAD_ID, UNK_ID, BOS_ID, EOS_ID) == (0, 1, 2, 3)
    assert [tokenizer.piece(i) for i in range(4)] == ["<pad>", "<unk>", "<s>", "</s>"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert not {0, 1, 2, 3} & set(tokenizer.encode("<pad> <unk> <s> </s> \u2047 漢"))


def test_every_byte_has_a_piece(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(4 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_long_texts_are_cut_without_loss(tokenizer: Tokenizer, separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = separator.join(f"line{number}" for number in range(500))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "MAX_CHUNK", 64)
    cut = tokenizer.encode(text)
    assert tokenizer.decode(cut) == text
    if separator == "\n":
        assert cut == whole


def test_the_same_texts_give_the_same_model() -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(100)]
    texts = [" ".join(generator.choices(words, k=20)) for _ in range(200)]
    assert train_tokenizer(texts, 400).model == train_tokenizer(iter(texts), 400).model


def test_too_little_text_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"cannot train a tokenizer of 5000 pieces.*give more text or a smaller"):
        train_tokenizer(["two words"], 5000)


def test_a_file_that_is_no_model_is_an_error(tmp_path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"x\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_the_bytes_of_pieces_add_up_to_those_of_the_text(tokenizer):
    lengths = tokenizer.piece_bytes()
    for text in ("plain words", "two  spaces\n\ttab", "caf\u00e9 \u65e5\u672c \U0001f600", ""):
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert not lengths[[tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]].any()
