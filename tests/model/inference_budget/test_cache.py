"""The pruned cache, token by token and in parallel, against plain Python and against the full pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inference_budget import (
    POLICIES,
    Budgets,
    cache_bytes,
    eviction_times,
    find_policy,
    init_pruned_cache,
    memory_factor,
    prefill,
)
from inference_budget.eviction import Arriving, Projections, attend_evicting
from selective_attention import Transformer, TransformerConfig
from selective_attention.transformer.decoding import decode_step
from tests.support.small_model import LENGTH, STANDARD, make_model, make_tokens, oracle_layer

UNOPTIMISED = {"xla_backend_optimization_level": 0}
STEP = jax.jit(
    lambda graph, parameters, cache, tokens_B: decode_step(nnx.merge(graph, parameters), cache, tokens_B),
    static_argnums=0,
    compiler_options=UNOPTIMISED,
)
SELECTIVE_POLICIES = [name for name in POLICIES if name not in ("h2o-per-head", "forgotten")] + ["forgotten-2-5"]
STANDARD_POLICIES = [name for name in POLICIES if name not in ("selective", "forgotten")]


def decode_all(model, cache, tokens_BN):
    graph, parameters = nnx.split(model)
    logits = []
    for tokens_B in np.asarray(tokens_BN).T:
        logits_BV, cache = STEP(graph, parameters, cache, tokens_B)
        logits.append(np.asarray(logits_BV))
    return np.stack(logits, axis=1), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames=("budgets", "policy", "block"))
def _prefill(graph, parameters, tokens, lengths, **options):
    return prefill(nnx.merge(graph, parameters), tokens, lengths, **options)


def prefilled(model, tokens, lengths, budgets, policy, block=None):
    return _prefill(*nnx.split(model), tokens, lengths, budgets=budgets, policy=policy, block=block)


@pytest.mark.parametrize("budget", [2, pytest.param(3, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("name", ["selective", "h2o", "tova", "sinks", "oldest"])
def test_a_layer_evicts_and_attends_as_plain_python_does(name, budget):
    length, kv_heads = 14, 2
    config = TransformerConfig(
        vocab_size=8, num_layers=1, num_heads=4, num_kv_heads=kv_heads, d_model=8, mlp_dim=8, max_length=length,
        head_dim=4, dtype="float32", attention="reference",
    )  # fmt: skip
    rng = np.random.default_rng(budget)
    q = rng.normal(size=(2, length, 4, 4)).astype(np.float32) * 2
    k, v = rng.normal(size=(2, 2, length, kv_heads, 4)).astype(np.float32)
    zeros = jnp.zeros(2, jnp.int32)
    arriving = Arriving(zeros, zeros + length, zeros + budget, layer=0)
    out, _, hidden_at = attend_evicting(POLICIES[name], config, None, Projections(q, k, v, None, None), arriving)
    for row in range(2):
        expected, gone = oracle_layer(POLICIES[name], budget, q[row], k[row], v[row], selective=True)
        assert gone == {j: int(i) for j, i in enumerate(hidden_at[row]) if i < length}
        assert len(gone) == length - budget
        np.testing.assert_allclose(out[row], expected, atol=2e-6)


def cases():
    """A few of every kind for `make test`, and all."""
    quick = {("selective", "{}"), ("h2o", "{}"), ("tova", str(STANDARD)), ("sinks", "{}"), ("random", str(STANDARD))}
    quick.add(("forgotten-2-5", "{}"))
    for name, changes in all_cases():
        grouped = name != "tova" and set(changes) - {"selection", "positions"}
        marks = [] if (name, str(changes)) in quick or grouped else [pytest.mark.slow]
        yield pytest.param(name, changes, marks=marks)


def all_cases():
    yield from itertools.product(SELECTIVE_POLICIES, [{}])
    yield from itertools.product(STANDARD_POLICIES, [STANDARD])
    yield from (("selective", {"num_kv_heads": 2}), ("h2o-per-head", {"num_kv_heads": 2, **STANDARD}))
    yield from (("selective", {"selection": "own_head"}), ("selective", {"selection": "unprotected_self"}))
    yield from (("selective", {"positions": "learned"}), ("tova", {"attention": "xla"}))


@pytest.mark.parametrize(("name", "changes"), list(cases()), ids=str)
def test_decoding_under_budgets_equals_the_parallel_pass(name, changes):
    model, tokens_BN, policy = make_model(**changes), make_tokens(), find_policy(name)
    budgets = Budgets(tuple(np.random.default_rng(len(name)).integers(2, 12, 2)), LENGTH)
    with jax.default_matmul_precision("highest"):
        hidden_at, expected_BNV = eviction_times(model, tokens_BN, budgets, policy)
        logits_BNV, cache = decode_all(model, init_pruned_cache(model.config, 3, budgets, policy), tokens_BN)
    np.testing.assert_allclose(logits_BNV, expected_BNV, atol=1e-4, rtol=0)
    for layer, hidden_at_BN in zip(cache.layers, hidden_at, strict=True):
        for held, hidden_at_N in zip(layer.position.reshape(-1, layer.budget), hidden_at_BN, strict=True):
            assert sorted(held[held >= 0].tolist()) == np.flatnonzero(hidden_at_N >= LENGTH).tolist()


@pytest.mark.parametrize(("name", "changes"), list(cases()), ids=str)
def test_ragged_prompts_longer_than_the_budgets_go_on_as_if_fed_token_by_token(name, changes):
    model, tokens_BN, policy = make_model(**changes), make_tokens(), find_policy(name)
    lengths_B = np.array([15, 1, 8], np.int32)
    budgets = Budgets((3, 9), LENGTH)
    with jax.default_matmul_precision("highest"):
        _, expected_BNV = eviction_times(model, tokens_BN, budgets, policy)
        logits_BV, cache = prefilled(model, tokens_BN[:, :15], lengths_B, budgets, policy)
        rows = np.arange(3)
        np.testing.assert_allclose(logits_BV, expected_BNV[rows, lengths_B - 1], atol=1e-4, rtol=0)
        places_BS = lengths_B[:, None] + np.arange(LENGTH - 15)
        logits_BSV, _ = decode_all(model, cache, tokens_BN[rows[:, None], places_BS])
    np.testing.assert_allclose(logits_BSV, expected_BNV[rows[:, None], places_BS], atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, STANDARD, {"num_kv_heads": 2}], ids=str)
def test_full_budgets_change_nothing(changes):
    model, tokens_BN = make_model(**changes), make_tokens()
    policy, budgets = POLICIES["oldest"], Budgets.full(2, LENGTH)
    expected_BNV = np.asarray(jax.jit(Transformer.__call__)(model, tokens_BN))
    cache = init_pruned_cache(model.config, 3, budgets, policy)
    np.testing.assert_allclose(decode_all(model, cache, tokens_BN)[0], expected_BNV, atol=1e-4, rtol=0)
    lengths_B = np.array([15, 1, 8], np.int32)
    logits_BV, _ = prefilled(model, tokens_BN[:, :15], lengths_B, budgets, policy)
    np.testing.assert_allclose(logits_BV, expected_BNV[np.arange(3), lengths_B - 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["selective", "h2o", "forgotten-2-5"])
def test_prefill_in_blocks_equals_prefill_at_once(name):
    model, tokens_BN, policy = make_model(attention="xla"), make_tokens(), find_policy(name)
    budgets, lengths_B = Budgets((3, 9), LENGTH), np.array([24, 5, 11], np.int32)
    with jax.default_matmul_precision("highest"):
        whole, cache = prefilled(model, tokens_BN, lengths_B, budgets, policy)
        parts, cache_of_parts = prefilled(model, tokens_BN, lengths_B, budgets, policy, block=7)
    np.testing.assert_allclose(parts, whole, atol=1e-4, rtol=0)
    for one, other in zip(cache.layers, cache_of_parts.layers, strict=True):
        np.testing.assert_array_equal(one.position, other.position)
        used = one.position >= 0
        np.testing.assert_allclose(one.f[used], other.f[used], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["selective", "oldest", "sinks", "random"])
def test_a_larger_budget_holds_what_a_smaller_one_holds(name):
    model, tokens_BN = make_model(num_layers=1), make_tokens()
    before = None
    for budget in range(6, 12):  # from where sinks no longer depend on the budget
        hidden_at, _ = eviction_times(model, tokens_BN, Budgets((budget,), LENGTH), POLICIES[name])
        if before is not None:
            assert (hidden_at >= before).all()
        before = hidden_at


def test_ties_go_to_the_oldest_token_and_not_to_the_lowest_slot():
    model = make_model(num_layers=1)
    model.blocks.query_norm[...] *= 0  # all logits and so all F are zero
    selective, oldest = (
        eviction_times(model, make_tokens(), Budgets((5,), LENGTH), POLICIES[name])[0]
        for name in ("selective", "oldest")
    )
    np.testing.assert_array_equal(selective, oldest)
    cache = init_pruned_cache(model.config, 3, Budgets((5,), LENGTH), POLICIES["selective"])
    _, cache = decode_all(model, cache, make_tokens())
    assert sorted(cache.layers[0].position[0, 0].tolist()) == [0, *range(LENGTH - 4, LENGTH)]


@pytest.mark.parametrize(("dtype", "of_head"), [("float32", 8 * 4), ("bfloat16", 8 * 2), ("int8", 8 + 2)])
@pytest.mark.parametrize(
    ("name", "changes", "bookkeeping"), [("selective", {}, 8), ("h2o", {}, 12), ("tova", STANDARD, 8)]
)
def test_the_compiled_step_holds_the_budgets_and_nothing_else(name, changes, bookkeeping, dtype, of_head):
    model, budgets = make_model(num_kv_heads=2, **changes), Budgets((3, 9), LENGTH)
    cache = init_pruned_cache(model.config, 4, budgets, POLICIES[name], dtype)
    graph, parameters = nnx.split(model)
    step = jax.jit(
        lambda parameters, cache, tokens_B: decode_step(nnx.merge(graph, parameters), cache, tokens_B), donate_argnums=1
    )
    memory = step.lower(parameters, cache, np.zeros(4, np.int32)).compile().memory_analysis()
    expected = 4 * (3 + 9) * (2 * 2 * of_head + bookkeeping)
    positions = 4 * 4  # of the rows
    assert cache_bytes(cache) == expected
    assert memory.alias_size_in_bytes == expected + positions
    other = sum(x.nbytes for x in jax.tree.leaves(parameters)) + 4 * 4
    assert memory.argument_size_in_bytes == expected + positions + other
    full = 4 * 2 * LENGTH * (2 * 2 * of_head + (0 if changes else 4))  # with F where it selects
    assert memory_factor(cache, LENGTH) == full / expected
    assert budgets.memory_factor == 4.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("selective", STANDARD, "policy 'selective' needs a selective model"),
        ("h2o-per-head", {}, "'h2o-per-head' is not defined on a selective model.*take 'h2o'"),
    ],
)
def test_a_policy_that_the_model_cannot_have_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        init_pruned_cache(make_model(**changes).config, 1, Budgets((3, 9), LENGTH), POLICIES[name])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((1, 9), r"the budget of layer 0 is 1; it must be from 2 .* to the context of 24"),
        ((3, 25), "the budget of layer 1 is 25"),
        ((3, 4.9), "the budget of layer 1 is 4.9; it must be a whole number of tokens"),
        ((3, "9"), "the budget of layer 1 is '9'"),
        ((3, 9, 9), "there are 3 budgets, but the model has 2 layers"),
    ],
)
def test_budgets_out_of_range_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        init_pruned_cache(make_model().config, 1, Budgets(tokens, LENGTH), POLICIES["selective"])


class TestBudgets:
    def test_uniform_and_pyramid_have_the_total_that_was_asked_for(self):
        for total in range(24, 12 * 512, 101):
            for made in (Budgets.uniform(12, 512, total), Budgets.pyramid(12, 512, total)):
                assert made.total == total

    def test_pyramid_falls_on_a_line_as_pyramid_kv_does(self):
        assert Budgets.pyramid(5, 512, 5 * 100).tokens == (
            195 + 1,
            147,
            100,
            52,
            5,
        )  # rounded down, and what is left over

    def test_uniform_gives_the_lowest_layers_what_does_not_divide(self):
        assert Budgets.uniform(4, 512, 42).tokens == (11, 11, 10, 10)
