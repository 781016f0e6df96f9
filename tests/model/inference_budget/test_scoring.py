"""Scores of continuations are those of the parallel pass, and a context is taken in once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference_budget import POLICIES, Budgets, BudgetsError, Request, Scorer, eviction_times
from selective_attention import Selection
from tests.support.small_model import LENGTH, STANDARD, VOCAB, make_model, make_tokens

slow = partial(pytest.param, marks=pytest.mark.slow)
CUTS = [(5, 9), (9, 1), (1, 4), (14, 10)]  # tokens of context and continuation


@pytest.fixture(scope="module")
def scorer():
    return Scorer(make_model(), bos_id=2)


@pytest.fixture(scope="module")
def requests():
    tokens_BN = make_tokens(batch=len(CUTS)).tolist()
    return [Request(row[:n], row[n : n + m]) for row, (n, m) in zip(tokens_BN, CUTS, strict=True)]


def of_logits(logits_NV, request):
    """(log-probability, greedy) from the logits after each token of context and continuation."""
    start, tokens = len(request.context) - 1, np.asarray(request.continuation)
    log_TV = np.asarray(jax.nn.log_softmax(logits_NV.astype(jnp.float32), axis=-1))[start : start + len(tokens)]
    greedy = bool((log_TV.argmax(axis=-1) == tokens).all())
    return float(log_TV[np.arange(len(tokens)), tokens].sum()), greedy


def check(scores, logits_of, requests):
    for score, request in zip(scores, requests, strict=True):
        wanted, greedy = of_logits(logits_of(np.array([[*request.context, *request.continuation]]))[0], request)
        # A float32 of this size has steps of up to 1e-7 of it, and the sum has as many as tokens.
        assert score.log_probability == pytest.approx(wanted, abs=1e-5, rel=5e-7)
        assert score.greedy == greedy


@pytest.mark.parametrize(
    "changes", [{}, slow(STANDARD), slow({"selection": Selection.OWN_HEAD, "num_kv_heads": 2})], ids=str
)
def test_with_a_full_cache_they_are_those_of_the_plain_pass(requests, changes):
    model = make_model(**changes)
    check(Scorer(model).score(requests), model, requests)


@pytest.mark.parametrize(
    ("policy", "changes"), [("h2o", {}), slow("selective", {}), slow("h2o-per-head", STANDARD)], ids=str
)
def test_under_budgets_they_are_those_of_the_parallel_pass_with_the_same_evictions(requests, policy, changes):
    model, budgets, policy = make_model(**changes), Budgets((7, 4), LENGTH), POLICIES[policy]
    scores = Scorer(model, budgets, policy).score(requests)
    check(scores, lambda tokens_1N: eviction_times(model, tokens_1N, budgets, policy)[1], requests)
    full = Scorer(model).score(requests)
    assert any(abs(one.log_probability - other.log_probability) > 1e-3 for one, other in zip(scores, full, strict=True))


def test_the_likeliest_continuation_is_greedy_and_no_other(scorer):
    context = make_tokens(batch=1)[0, :6].tolist()
    likeliest = scorer.decoder.generate([context], 5, temperature=0)[0]
    other = [*likeliest[:-1], (likeliest[-1] + 1) % VOCAB]
    assert [score.greedy for score in scorer.score([Request(context, likeliest), Request(context, other)])] == [
        True,
        False,
    ]


def test_a_context_is_taken_in_once_for_all_its_continuations(scorer, requests):
    before, shared = scorer.contexts, requests[0].context
    many = [Request(shared, [token]) for token in range(3, 40)]
    scores = scorer.score([*many, *requests])
    assert scorer.contexts - before == len(requests)  # of which one has the shared context
    # Their tokens are all that there are but three, so that together they are at most certain.
    assert 0 < sum(np.exp(score.log_probability) for score in scores[: len(many)]) < 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([2, 5], []), "request 0 has nothing to score: its continuation has no token"),
        (Request([5, 5], [6]), "prompt 0 starts with token 5; put <BOS>, which is 2, before it"),
        (Request([2] * 20, [6] * 6), "request 0 has 25 tokens to take in; the model has room for 24"),
        (Request([2], [40]), "has token 40 at position 0; the model's are from 0 to 39"),
    ],
)
def test_what_cannot_be_scored_is_named(scorer, request_, message):
    with pytest.raises(BudgetsError) as error:
        scorer.score([request_])
    assert message in str(error.value)


def test_budgets_without_a_policy_are_refused():
    with pytest.raises(BudgetsError, match="budgets and a policy go together"):
        Scorer(make_model(), Budgets((7, 4), LENGTH))
