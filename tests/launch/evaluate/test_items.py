"""How texts become requests, and what retrieval asks."""

import numpy as np
import pytest

from data import Tokenizer, load_tokenizer
from inference_budget import Request
from launch.commands import InputError
from launch.evaluate.items import encode_pair, fitted
from launch.evaluate.retrieval import ASSIGNMENTS, KINDS, make_items

BOS = 2


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder / "data" / "tokenizer.model")


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(tokenizer):
    one, other = (encode_pair(tokenizer, *pair, "x") for pair in (("a token ", "grows"), ("a token", " grows")))
    assert one == other == Request([BOS, *tokenizer.encode("a token")], tokenizer.encode(" grows"))


def test_pieces_across_the_border_are_those_of_the_whole_text(tokenizer):
    context, continuation = "so old wor", "ds fade from view and grow with every later token"
    whole = tokenizer.encode(context + continuation)
    request = encode_pair(tokenizer, context, continuation, "x")
    before = tokenizer.encode(context)
    assert whole[: len(before)] != before  # a piece does cross it
    assert request == Request([BOS, *before], whole[len(before) :])


def test_what_is_too_long_loses_the_oldest_tokens_but_not_bos():
    assert fitted(Request([BOS, 5, 6, 7, 8], [9, 10]), 6, "x") == Request([BOS, 5, 6, 7, 8], [9, 10])
    assert fitted(Request([BOS, 5, 6, 7, 8], [9, 10]), 4, "x") == Request([BOS, 7, 8], [9, 10])
    assert fitted(Request([BOS, 5, 6], [7, 8]), 2, "x") == Request([BOS], [7, 8])
    with pytest.raises(InputError, match="x has a continuation of 2 tokens, longer than the context of 1"):
        fitted(Request([BOS, 5, 6], [7, 8]), 1, "x")


@pytest.mark.parametrize("kind", KINDS)
def test_retrieval_can_be_solved_by_reading_and_is_as_long_as_was_asked(kind, tokenizer):
    text_T = np.array(tokenizer.encode("so old words fade from view as every later query finds it stale " * 40))
    items = make_items(kind, tokenizer, text_T, 200, 30, seed=1)
    for item in items:
        (context,) = {tuple(request.context) for request in item.requests}
        longest = max(len(request.continuation) for request in item.requests)
        assert context[0] == BOS and len(context) + longest - 1 == 200
        # The text around may run into a line, so what is read is the lines' own words.
        text = tokenizer.decode(context)
        question = text[text.rindex("\n") :]
        told = [part.split(".\n")[0] for part in text.split(question)[1:-1]]
        assert item.answers[item.gold] == told[-1].strip()
        for answer, request in zip(item.answers, item.requests, strict=True):
            assert tokenizer.decode(request.continuation) == f" {answer}"
            assert (f" {answer}.\n" in text) == (kind == "variables" or answer == item.answers[item.gold])
    assert len({item.gold for item in items}) >= ASSIGNMENTS - 1  # its number says nothing
    assert items == make_items(kind, tokenizer, text_T, 200, 30, seed=1)
    assert items != make_items(kind, tokenizer, text_T, 200, 30, seed=2)


def test_some_variables_have_stale_values(tokenizer):
    text_T = np.arange(4, 290)
    stale = 0
    for item in make_items("variables", tokenizer, text_T, 150, 30, seed=0):
        text = tokenizer.decode(item.requests[0].context)
        stale += text.count(text[text.rindex("\n") :]) > 2  # the question, and more than one line
    assert 10 < stale < 30
