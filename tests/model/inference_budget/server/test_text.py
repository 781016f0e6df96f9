"""Text that comes token by token is the text of all tokens, and ends before a stop string."""

import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_budget.server.text import TextStream
from inference_budget.text import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(dataset_path: Path) -> TextTokenizer:
    return TextTokenizer(dataset_path)


@pytest.fixture(scope="module")
def pieces(tokenizer: TextTokenizer) -> list[bytes]:
    return tokenizer.pieces()


@pytest.fixture(scope="module")
def oracle(dataset_path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(dataset_path / "tokenizer.model"))


def streamed(pieces: list[bytes], tokens: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    """What is given after each token, and at the end."""
    stream, given = TextStream(pieces, stops), []
    for token in tokens:
        stream.add(token)
        given.append(stream.take())
        if stream.stopped:
            return given
    stream.close()
    return [*given, stream.take()]


def test_random_tokens_read_like_sentencepiece_decodes_them(tokenizer, pieces, oracle):
    rng = random.Random(0)
    bytes_ids = [token for token in range(tokenizer.vocab_size) if oracle.is_byte(token)]
    for _ in range(2000):
        ids = rng.choices(bytes_ids if rng.random() < 0.5 else range(tokenizer.vocab_size), k=rng.randrange(12))
        assert "".join(streamed(pieces, ids)) == oracle.decode(ids)


def test_a_continuation_keeps_the_spaces_of_a_tokenizer_that_begins_texts_with_one(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        texts = iter(["the cat sat on the mat", "a dog ran over the hill"] * 50)
        options = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "hard_vocab_limit": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, vocab_size=60, **options)
    tokenizer, rng = TextTokenizer(tmp_path), random.Random(0)
    pieces = tokenizer.pieces()
    for _ in range(1000):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(6))
        assert "".join(streamed(pieces, ids)) == tokenizer.continuation(tokenizer.encode("the cat"), ids)


@pytest.mark.parametrize("text", ["  two  spaces \n\ttab ", "naïve 😀 日本語 e\u0301", "", "\x00", "\ufffd <s> <0x41>"])
def test_a_text_comes_back_as_it_was(tokenizer, pieces, text):
    assert "".join(streamed(pieces, tokenizer.encode(text))) == text


def test_half_a_character_waits_for_its_other_half(tokenizer, pieces):
    ids = tokenizer.encode("😀")[1:]
    assert len(ids) == 4
    assert streamed(pieces, ids) == ["", "", "", "😀", ""]
    assert streamed(pieces, ids[:2]) == ["", "", "��"]


PIECES = [b"a", b"b", b"ab", b"ba", b"c", "é".encode(), "é".encode()[:1], "é".encode()[1:], b""]
STOPS = st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=12), STOPS)
@example([0, 1, 4], ["abc", "b"])
@example([0, 6, 7, 1], ["é"])
@settings(max_examples=100, deadline=None)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(tokens, stops):
    """Against a search in the whole text after each token."""
    found: list[int] = []
    for end in range(len(tokens) + 1):
        whole = "".join(streamed(PIECES, tokens[:end])[:-1] if end < len(tokens) else streamed(PIECES, tokens))
        found = [at for stop in stops if (at := whole.find(stop)) >= 0]
        if found:
            break
    assert "".join(streamed(PIECES, tokens, tuple(stops))) == whole[: min(found, default=None)]


def test_what_may_be_the_beginning_of_a_stop_string_waits():
    assert streamed(PIECES, [4, 0, 1, 0, 1, 1], ("abc",)) == ["c", "", "", "ab", "", "abb", ""]
    assert streamed(PIECES, [4, 0, 1, 4, 0], ("abc",)) == ["c", "", "", ""]
    assert streamed(PIECES, [4, 0, 1], ("abc",)) == ["c", "", "", "ab"]


def test_tokens_that_the_tokenizer_lacks_are_no_text():
    assert "".join(streamed(PIECES, [0, 99, 1])) == "ab"
