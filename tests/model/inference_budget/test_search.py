"""The search against brute force, and its losses against decoding."""

import itertools
import math

import jax
import numpy as np
import pytest

from inference_budget import (
    POLICIES,
    Budgets,
    BudgetsError,
    Evaluator,
    Found,
    Windows,
    best_point,
    eviction_times,
    exchange,
    search,
    uniform,
)
from inference_budget.perplexity import Losses
from inference_budget.search import Point
from tests.support.small_model import LENGTH, STANDARD, make_model, make_tokens


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def make_evaluator(policy="selective", **changes):
    model, tokens_BN = make_model(dtype="float64", **changes), make_tokens(batch=4, length=LENGTH + 1)
    windows = Windows(tokens_BN[:, :-1], tokens_BN[:, 1:])
    return model, windows, Evaluator(model, windows, POLICIES[policy])


def brute_force_nll(model, windows, budgets, policy):
    """Without prefixes, candidates or parts in common."""
    _, logits_BNV = eviction_times(model, windows.inputs, budgets, POLICIES[policy])
    log_p = np.asarray(jax.nn.log_softmax(logits_BNV))
    return -np.take_along_axis(log_p, windows.targets[..., None], axis=-1).mean()


@pytest.mark.parametrize("policy", ["selective", "h2o"])
def test_losses_of_candidates_together_are_those_of_each_alone(policy):
    model, windows, evaluator = make_evaluator(policy, num_layers=3)
    base = Budgets((20, 9, 14), LENGTH)
    evaluator.keep(base)
    candidates = [base, base.replaced(0, 5), base.replaced(2, 2), base.replaced(1, 4), Budgets.full(3, LENGTH)]
    for budgets, losses in zip(candidates, evaluator.losses(candidates), strict=True):
        assert losses.mean == pytest.approx(brute_force_nll(model, windows, budgets, policy), abs=1e-6)


def test_full_budgets_cost_what_the_plain_pass_does():
    model, windows, evaluator = make_evaluator()
    plain = Evaluator(model, windows, None).losses([Budgets.full(2, LENGTH)])[0]
    assert evaluator.losses([Budgets.full(2, LENGTH)])[0].mean == pytest.approx(plain.mean, abs=1e-7)


def test_the_greedy_choices_are_those_of_brute_force():
    model, windows, evaluator = make_evaluator()
    curve = search(evaluator, target_nll=math.inf, step=5).curve
    for before, after in itertools.pairwise(curve):
        cuts = [before.budgets.replaced(n, max(k - 5, 2)) for n, k in enumerate(before.budgets.tokens) if k > 2]
        measured = [brute_force_nll(model, windows, cut, "selective") for cut in cuts]
        assert after.budgets in [cut for cut, nll in zip(cuts, measured, strict=True) if nll < min(measured) + 1e-7]
    assert curve[-1].budgets.tokens == (2, 2)


def test_an_interrupted_search_goes_on_from_what_was_measured():
    _, _, evaluator = make_evaluator()
    known = {}
    whole = search(evaluator, target_nll=math.inf, step=6, known=known)
    half = dict(list(known.items())[: len(known) // 2])
    measured = []
    losses = evaluator.losses
    evaluator.losses = lambda candidates: measured.extend(candidates) or losses(candidates)
    resumed = search(evaluator, target_nll=math.inf, step=6, known=half)
    assert [point.budgets for point in resumed.curve] == [point.budgets for point in whole.curve]
    assert len(measured) == len(known) - len(known) // 2


def test_lazy_with_unbounded_slack_is_exact():
    _, _, evaluator = make_evaluator(num_layers=3)
    exact, lazy = (
        search(evaluator, target_nll=math.inf, step=7, **options) for options in ({}, {"lazy": True, "slack": math.inf})
    )
    assert [point.budgets for point in lazy.curve] == [point.budgets for point in exact.curve]
    assert lazy.missed == 0


def test_the_best_point_is_the_smallest_cache_that_meets_the_target_also_after_a_miss():
    nll = {24: 1.0, 12: 1.3, 8: 1.1, 4: 2.0}
    found = Found(tuple(Point(Budgets((k, k), LENGTH), value, value) for k, value in nll.items()))
    assert found.best(1.2).budgets.tokens == (8, 8)
    assert found.best(0.9) is None


def measured_point(evaluator, tokens):
    losses = evaluator.losses([Budgets(tokens, LENGTH)])[0]
    return Point(Budgets(tokens, LENGTH), losses.mean, float(losses.last_quarter.mean()))


def test_an_exchange_moves_to_where_brute_force_finds_no_better_move_and_then_cuts():
    model, windows, evaluator = make_evaluator(num_layers=3)
    start = measured_point(evaluator, (2, 20, 8))
    path = exchange(evaluator, start, target_nll=start.nll, step=3)
    assert path[0] == start and best_point(path, start.nll).budgets.memory_factor > start.budgets.memory_factor
    for before, after in itertools.pairwise(path):
        moves = [
            before.budgets.replaced(a, before.budgets.tokens[a] - n).replaced(b, before.budgets.tokens[b] + n)
            for a, b in itertools.permutations(range(3), 2)
            if (n := min(3, before.budgets.tokens[a] - 2, LENGTH - before.budgets.tokens[b])) > 0
        ]
        cuts = [before.budgets.replaced(n, max(k - 3, 2)) for n, k in enumerate(before.budgets.tokens) if k > 2]
        losses = {budgets: brute_force_nll(model, windows, budgets, "selective") for budgets in [*moves, *cuts]}
        best_move = min(losses[budgets] for budgets in moves)
        if after.budgets.total == before.budgets.total:
            assert losses[after.budgets] < min(best_move + 1e-7, before.nll)
        else:
            assert before.nll <= min(best_move + 1e-7, start.nll)
            assert losses[after.budgets] < min(losses[budgets] for budgets in cuts) + 1e-7


def test_an_interrupted_exchange_goes_on_from_what_was_measured():
    _, _, evaluator = make_evaluator(num_layers=3)
    start, known = measured_point(evaluator, (2, 20, 8)), {}
    whole = exchange(evaluator, start, target_nll=start.nll, step=3, known=known)
    half = dict(list(known.items())[: len(known) // 2])
    measured = []
    losses = evaluator.losses
    evaluator.losses = lambda candidates: measured.extend(candidates) or losses(candidates)
    resumed = exchange(evaluator, start, target_nll=start.nll, step=3, known=half)
    assert [point.budgets for point in resumed] == [point.budgets for point in whole]
    assert len(measured) == len(known) - len(known) // 2


def test_uniform_budgets_go_down_until_the_target_is_missed_more_often_than_patience_allows():
    _, _, evaluator = make_evaluator()
    points = uniform(evaluator, 41, target_nll=-math.inf, step=4, patience=2)
    assert [point.budgets.tokens for point in points] == [(21, 20), (19, 18), (17, 16)]
    points = uniform(evaluator, 12, target_nll=math.inf, step=5)
    assert [point.budgets.tokens for point in points] == [(6, 6), (4, 3)]


def test_among_equal_factors_the_best_point_costs_least():
    points = [Point(Budgets(tokens, LENGTH), nll, nll) for tokens, nll in (((8, 4), 1.1), ((6, 6), 1.0), ((9, 9), 0.5))]
    assert best_point(points, 1.2) == points[1]
    assert best_point(points[::-1], 1.2) == points[1]
    assert best_point(points, 0.4) is None


def test_differences_are_paired():
    nll_WN = np.random.default_rng(0).normal(size=(6, 8))
    one, other = Losses.of(nll_WN), Losses.of(nll_WN + 0.25)
    assert other.minus(one) == (pytest.approx(0.25), pytest.approx(0, abs=1e-12))
    assert one.last_quarter == pytest.approx(nll_WN[:, -2:].mean(axis=1))


def test_a_standard_model_is_searched_by_the_other_policies():
    _, _, evaluator = make_evaluator("tova", **STANDARD)
    assert search(evaluator, target_nll=math.inf, step=11).curve[-1].budgets.tokens == (2, 2)


def test_steps_out_of_range_are_refused():
    _, _, evaluator = make_evaluator()
    with pytest.raises(BudgetsError, match=r"steps must be from 1 to 23, the first at least the last; got 2 and 5"):
        search(evaluator, target_nll=1.0, step=5, first_step=2)
