"""Tokens that leave once they are forgotten: against plain Python, and against the model that keeps everything."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference_budget import (
    Budgets,
    BudgetsError,
    Decoder,
    Evaluator,
    Forgotten,
    Windows,
    cache,
    eviction_times,
    find_policy,
    init_pruned_cache,
    load_budgets,
    policy_for,
    policy_name,
    save_budgets,
)
from inference_budget.eviction import Arriving, Projections, attend_evicting
from inference_budget.perplexity import tokens_held
from selective_attention import Selection, TransformerConfig
from tests.support.small_model import LENGTH, STANDARD, make_model, make_tokens, oracle_layer

LONG = 96  # tokens after which most are forgotten, even by the exact bound


@pytest.mark.parametrize("budget", [4, 14])
@pytest.mark.parametrize("above", [0.0, 1.5])
def test_a_layer_forgets_and_a_full_one_evicts_as_plain_python_does(above, budget):
    length, policy = 14, Forgotten((above,))
    config = TransformerConfig(
        vocab_size=8, num_layers=1, num_heads=4, num_kv_heads=2, d_model=8, mlp_dim=8, max_length=length,
        head_dim=4, dtype="float32", attention="reference",
    )  # fmt: skip
    rng = np.random.default_rng(budget)
    q = rng.normal(size=(2, length, 4, 4)).astype(np.float32) * 2
    k, v = rng.normal(size=(2, 2, length, 2, 4)).astype(np.float32)
    zeros = jnp.zeros(2, jnp.int32)
    arriving = Arriving(zeros, zeros + length, zeros + budget, layer=0)
    out, _, hidden_at = attend_evicting(policy, config, None, Projections(q, k, v, None, None), arriving)
    for row in range(2):
        expected, gone = oracle_layer(policy, budget, q[row], k[row], v[row], selective=True)
        assert gone == {j: int(i) for j, i in enumerate(hidden_at[row]) if i < length}
        assert budget < length or 0 < len(gone) < length - 1  # without a limit, some are forgotten and some are not
        np.testing.assert_allclose(out[row], expected, atol=2e-6)


@pytest.fixture(scope="module")
def long_model():
    return make_model(max_length=LONG, num_layers=1)


@pytest.mark.parametrize("selection", [Selection.PAPER, Selection.OWN_HEAD])
def test_by_the_model_s_own_bound_dropping_changes_nothing_but_the_rounding(selection):
    model, tokens_BN = make_model(max_length=LONG, selection=selection), make_tokens(length=LONG)
    if selection is Selection.OWN_HEAD:
        model.blocks.query_sel_norm[...] *= 6
    policy = policy_for(Forgotten(), model)
    with jax.default_matmul_precision("highest"):
        hidden_at, logits_BNV = eviction_times(model, tokens_BN, Budgets.full(2, LONG), policy)
        np.testing.assert_allclose(logits_BNV, model(tokens_BN), atol=5e-6, rtol=0)
    dead = tokens_held(hidden_at)[..., -1] < 0.7 * LONG
    assert dead.all()


def test_a_threshold_that_is_too_low_is_seen_in_the_logits(long_model):
    tokens_BN = make_tokens(length=LONG)
    _, logits_BNV = eviction_times(long_model, tokens_BN, Budgets.full(1, LONG), Forgotten((1.0,)))
    assert np.abs(logits_BNV - long_model(tokens_BN)).max() > 1e-3


def test_a_limit_costs_nothing_until_it_is_reached(long_model):
    tokens_BN = make_tokens(length=LONG)
    held = tokens_held(eviction_times(long_model, tokens_BN, Budgets.full(1, LONG), Forgotten((6.0,)))[0])
    most = held.max()
    assert most < LONG
    unlimited, enough, scarce = (
        eviction_times(long_model, tokens_BN, Budgets((limit,), LONG), Forgotten((6.0,)))
        for limit in (LONG, most, most - 1)
    )
    np.testing.assert_array_equal(enough[0], unlimited[0])
    assert tokens_held(scarce[0]).max() == most - 1
    assert (np.asarray(scarce[0]) != np.asarray(unlimited[0])).any()


def test_a_decoder_draws_what_the_model_does_whose_cache_is_full(long_model):
    prompts = [row[:60].tolist() for row in make_tokens(length=LONG)]
    full = Decoder(long_model, Budgets.full(1, LONG), find_policy("oldest")).generate(prompts, 30, temperature=0)
    forgetting = Decoder(long_model, Budgets.full(1, LONG), Forgotten(), block=16)
    assert forgetting.generate(prompts, 30, temperature=0) == full
    _, after = forgetting.prefill(prompts)
    assert all((layer.position[:3] >= 0).sum() < 3 * 60 for layer in after.layers)


def test_a_prompt_s_blocks_attend_to_the_used_slots_alone(long_model, monkeypatch):
    monkeypatch.setattr(cache, "LEAST_SLOTS", 8)
    sizes, attend = [], cache.attend_evicting

    def counting(policy, config, held, new, arriving, heads_axis):
        sizes.append(0 if held is None else held.position.shape[1])
        return attend(policy, config, held, new, arriving, heads_axis)

    monkeypatch.setattr(cache, "attend_evicting", counting)
    tokens_BN, budgets = make_tokens(length=LONG), Budgets((40,), LONG)
    expected_BNV = eviction_times(long_model, tokens_BN, budgets, Forgotten((3.0,)))[1]
    decoder = Decoder(long_model, budgets, Forgotten((3.0,)), block=16)
    logits_BV, _ = decoder.prefill(tokens_BN.tolist())
    np.testing.assert_allclose(logits_BV[:3], expected_BNV[:, -1], atol=1e-4, rtol=0)
    assert sorted(set(sizes)) == [0, 8, 20, 40]


def test_tokens_held_are_counted_for_each_window(long_model):
    tokens_BN = make_tokens(batch=5, length=LONG)
    evaluator = Evaluator(long_model, Windows(tokens_BN, tokens_BN), Forgotten((3.0,)))
    held_LWN = evaluator.tokens_held(Budgets.full(1, LONG))
    hidden_at, _ = eviction_times(long_model, tokens_BN, Budgets.full(1, LONG), Forgotten((3.0,)))
    seen = np.arange(LONG)[:, None] >= np.arange(LONG)
    seen = seen & (np.arange(LONG)[:, None] < np.asarray(hidden_at)[..., None, :])
    np.testing.assert_array_equal(held_LWN, seen.sum(axis=-1))


def test_what_is_forgotten_is_dropped_from_the_losses_too(long_model):
    tokens_BN = make_tokens(length=LONG)
    windows, full = Windows(tokens_BN, np.roll(tokens_BN, -1, axis=1)), [Budgets.full(1, LONG)]
    kept, exact, low = (
        Evaluator(long_model, windows, policy).losses(full)[0].mean for policy in (None, Forgotten(), Forgotten((1.0,)))
    )
    assert abs(exact - kept) < 1e-6 and abs(low - kept) > 1e-4


@pytest.mark.parametrize("name", ["forgotten", "forgotten-16", "forgotten-0", "forgotten-39.25-0.00001"])
def test_a_threshold_is_part_of_the_name_in_files(name, tmp_path):
    model, policy = make_model(), find_policy(name)
    assert policy_name(policy) == name
    save_budgets(tmp_path / "x.json", model, Budgets((3, 9), LENGTH), policy, checkpoint="/runs/one")
    assert load_budgets(tmp_path / "x.json", model)[1] == policy
    assert "policy_source" not in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("forgotten", {"qk_norm": False}, "no QK norm bounds this model's logits; give a threshold in nats, such as"),
        ("forgotten", {"selection": "leaky"}, "F may fall again in this model; give a threshold"),
        ("forgotten-16", STANDARD, "policy 'forgotten-16' needs a selective model"),
        ("forgotten-16-8-4", {}, "has 3 thresholds; give one, or one for each of the model's 2 layers"),
    ],
)
def test_a_model_that_it_is_not_defined_on_is_refused(name, changes, message):
    model = make_model(**({"num_layers": 2} | changes)) if changes.get("qk_norm", True) else None
    config = TransformerConfig.from_width(1, vocab_size=8, max_length=8, **changes) if model is None else model.config
    with pytest.raises(BudgetsError, match=message):
        init_pruned_cache(config, 1, Budgets((3,) * config.num_layers, 8), find_policy(name))


@pytest.mark.parametrize("name", ["forgotten-", "forgotten--3", "forgotten-x", "forgotten-nan", "forgotten-inf"])
def test_what_is_no_threshold_is_refused(name):
    with pytest.raises(BudgetsError, match=r"threshold.* nats"):
        find_policy(name)


def test_without_its_model_s_threshold_it_cannot_be_used(long_model):
    layer = init_pruned_cache(long_model.config, 1, Budgets((3,), LONG), Forgotten()).layers[0]
    with pytest.raises(BudgetsError, match=r"has no threshold yet; take policy_for\(policy, model\)"):
        layer.policy.forgets(None)


@pytest.fixture
def benchmark():
    path = pathlib.Path(__file__).parents[3] / "benchmarks" / "forgotten.py"
    spec = importlib.util.spec_from_file_location("forgotten_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_counts_living_keys_flops_and_dead_tiles_as_the_mask_says(benchmark):
    length, rng = 320, np.random.default_rng(0)
    hidden_at = np.arange(length) + 1 + rng.integers(0, 90, (2, 3, length))
    hidden_at[:, :, 0] = hidden_at[1, :, 7] = length  # <BOS>, and one that stays
    dropped = benchmark.Dropped("F > 1", Forgotten((1.0, 1.0)), None, hidden_at)
    query, key = np.arange(length)[:, None], np.arange(length)
    living = (query > key) & (query < hidden_at[..., None, :])  # [L, W, N, N]
    np.testing.assert_allclose(dropped.living, living.sum(axis=-1).mean(axis=1)[:, 1:] / np.arange(1, length))
    for block in (128, 256):
        start = query // block * block
        kept = (query >= key) & ((key >= start) | (start < hidden_at[..., None, :]))
        share = kept.sum(axis=(2, 3)).mean(axis=1) / (query >= key).sum()
        np.testing.assert_allclose(dropped.flops_left(block), share)
    tiles = living.reshape(2, 3, 5, 64, 5, 64).any(axis=(3, 5))
    below = np.tri(5, k=-1, dtype=bool)
    np.testing.assert_allclose(dropped.dead_tiles(), (~tiles)[..., below].mean(axis=(1, 2)))
    assert dropped.dead_tiles()[0] > 0


@pytest.mark.parametrize("listed", [False, True], ids=["every tile has a step", "living tiles have steps"])
def test_the_benchmark_counts_a_tpu_kernels_tiles_by_the_keys_that_live(benchmark, listed):
    kernel = benchmark.Kernel(256, whole=1000, diagonal=600, part=550, ends=10, step=5, listed=listed, skipped=100.0)
    length, rng = 1024, np.random.default_rng(0)
    hidden_at = np.arange(length) + 1 + rng.integers(0, 200, (2, 3, length))
    hidden_at[..., 0] = length
    hidden_at[:, 1, 300] = length  # so that one window has more living tiles than the others
    expected, tiles = np.zeros((2, 4)), np.zeros((2, 3, 4))
    for layer, window, i in np.ndindex(2, 3, 4):
        for j in range(i):
            last = [hidden_at[layer, window, key : key + 128].max() for key in (256 * j, 256 * j + 128)]
            living = sum(end > 256 * i for end in last)
            expected[layer, i] += (100, 550, 1000)[living] / 3
            tiles[layer, window, i] += living > 0
    most = tiles[:, 1]  # all sequences of a batch have the steps of the one that has most
    assert (most.sum(axis=1) > tiles.mean(axis=1).sum(axis=1)).all()
    steps = most.sum(axis=1) + 4 if listed else 16
    np.testing.assert_allclose(kernel.cycles(hidden_at, length), expected.sum(axis=1) + 4 * 610 + 5 * steps)
    steps = most.sum(axis=1) + most[:, 2:].mean(axis=1) + 5 if listed else 25
    longer = expected.sum(axis=1) + expected[:, 2:].mean(axis=1) + 100 * (4 - np.mean([2, 3])) + 5 * 610 + 5 * steps
    np.testing.assert_allclose(kernel.cycles(hidden_at, 1280), longer)
