"""The TPU kernel of eviction times, interpreted on CPU, against the scan and against plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inference_budget import POLICIES, Budgets, eviction_kernel, prefill
from inference_budget.eviction import NEVER, Arriving, attend_evicting, evict
from selective_attention.selection import Projections
from tests.support.evictions import UNOPTIMISED, config_of, held_and_new
from tests.support.small_model import LENGTH, STANDARD, make_model, make_tokens, oracle_layer

pytestmark = pytest.mark.usefixtures("kernels_are_taken")
KERNEL = eviction_kernel
CASES = {  # sequences, tokens held before, new tokens, policy, changes of the config
    "one_group_in_one_block": (2, 0, 17, "selective", {}),
    "ragged_in_two_blocks_of_queries": (9, 0, 150, "selective", {}),
    "some_held_before_in_any_order": (5, 21, 30, "selective", {}),
    "several_blocks_of_keys": (3, 600, 40, "selective", {}),
    "leaky": (3, 20, 30, "selective", {"selection": "leaky"}),
    "unprotected_self": (3, 20, 30, "selective", {"selection": "unprotected_self"}),
    "oldest": (5, 21, 30, "oldest", {}),
    "sinks": (3, 21, 30, "sinks", {}),
    "random": (5, 21, 30, "random", {}),
    "a_model_without_selection": (3, 21, 30, "random", STANDARD),
}
QUICK = "ragged_in_two_blocks_of_queries", "some_held_before_in_any_order", "sinks", "random"


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_times_and_f_are_those_of_the_scan(case):
    batch, num_held, length, name, changes = CASES[case]
    columns, q, arriving = held_and_new(np.random.default_rng(length), batch, num_held, length)
    columns = columns._replace(f=None) if changes is STANDARD else columns

    @functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMISED)
    def run(attention, columns, q, arriving):
        config = config_of(attention, **changes)
        return evict(POLICIES[name], config, columns, q, q[:, :, 0], columns.k[:, :, 0], arriving, None)

    with jax.default_matmul_precision("highest"):
        (hidden_at, after), (expected, columns) = (run(a, columns, q, arriving) for a in ("pallas", "reference"))
    assert (np.asarray(expected) != NEVER).any()
    np.testing.assert_array_equal(hidden_at, expected)
    np.testing.assert_array_equal(after.position, columns.position)
    if columns.f is not None:
        held = np.asarray(after.position) > 0
        np.testing.assert_allclose(after.f[held], columns.f[held], rtol=1e-5, atol=1e-5)
        assert np.isfinite(after.f).all() or name != "selective"


@pytest.mark.parametrize("name", ["selective", pytest.param("sinks", marks=pytest.mark.slow)])
def test_a_layer_evicts_and_attends_as_plain_python_does_with_a_budget_for_every_row(name):
    length, budgets, rng = 14, [2, 3, 5, 13, 14], np.random.default_rng(0)
    q = rng.normal(size=(len(budgets), length, 4, 8)).astype(np.float32) * 2
    k, v = rng.normal(size=(2, len(budgets), length, 2, 8)).astype(np.float32)  # grouped heads
    zeros = jnp.zeros(len(budgets), jnp.int32)
    arriving = Arriving(zeros, zeros + length, jnp.array(budgets), 0)
    config = config_of("pallas", heads=4, num_kv_heads=2)
    run = jax.jit(functools.partial(attend_evicting, POLICIES[name], config, None), compiler_options=UNOPTIMISED)
    out, _, hidden_at = run(Projections(q, k, v, None, None), arriving)
    for row, budget in enumerate(budgets):
        expected, gone = oracle_layer(POLICIES[name], budget, q[row], k[row], v[row], selective=True)
        assert gone == {j: int(i) for j, i in enumerate(hidden_at[row]) if i < length}
        assert len(gone) == length - budget
        np.testing.assert_allclose(out[row], expected, atol=2e-5)


def test_ties_go_to_the_oldest_token_and_not_to_the_lowest_column():
    columns, q, arriving = held_and_new(np.random.default_rng(0), 3, 20, 30)
    columns = columns._replace(f=jnp.zeros_like(columns.f))
    config, k_sel = config_of("pallas"), columns.k[:, :, 0]
    times, oldest = (
        evict(POLICIES[name], config, columns, q, 0 * q[:, :, 0], k_sel, arriving, None)[0]
        for name in ("selective", "oldest")
    )
    np.testing.assert_array_equal(times, oldest)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("budgets", "policy", "block"), compiler_options=UNOPTIMISED
)
def _prefill(graph, parameters, tokens, lengths, **options):
    return prefill(nnx.merge(graph, parameters), tokens, lengths, **options)


def prefilled(attention, block=None, **changes):
    model = make_model(attention=attention, num_layers=1, **changes)
    budgets, lengths_B = Budgets((5,), LENGTH), np.array([24, 5, 11], np.int32)
    options = {"budgets": budgets, "policy": POLICIES["selective"], "block": block}
    with jax.default_matmul_precision("highest"):
        return _prefill(*nnx.split(model), make_tokens(), lengths_B, **options)


@pytest.mark.parametrize(
    ("block", "changes"),
    [
        (7, {"num_kv_heads": 2, "selection": "own_head"}),
        pytest.param(None, {}, marks=pytest.mark.slow),
        pytest.param(5, {}, marks=pytest.mark.slow),
        pytest.param(23, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_prefill_leaves_what_the_scan_leaves(block, changes):
    logits, cache = prefilled("pallas", block, **changes)
    expected, cache_of_scan = prefilled("reference", block, **changes)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    for one, other in zip(cache.layers, cache_of_scan.layers, strict=True):
        np.testing.assert_array_equal(one.position, other.position)
        np.testing.assert_allclose(one.f, other.f, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_leaves_what_one_device_leaves():
    alone, cache = prefilled("pallas", 7)
    with jax.set_mesh(jax.make_mesh((1, 2), ("data", "tensor"))):
        logits, cache_of_mesh = prefilled("pallas", 7)
    np.testing.assert_allclose(logits, alone, atol=1e-4, rtol=0)
    for one, other in zip(cache.layers, cache_of_mesh.layers, strict=True):
        np.testing.assert_array_equal(one.position, other.position)
