"""The TPU kernel of eviction times by attention weights, interpreted on CPU, against the scan and plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference_budget import POLICIES, weights_kernel
from inference_budget.eviction import NEVER, Arriving, attend_evicting, evict
from selective_attention.selection import Projections, Rule
from tests.support.evictions import UNOPTIMISED, config_of, held_and_new
from tests.support.small_model import STANDARD, oracle_layer

pytestmark = pytest.mark.usefixtures("kernels_are_taken")
KERNEL = weights_kernel
CASES = {  # sequences, tokens held before, new tokens, query and key/value heads, policy, changes of the config
    "tova": (3, 0, 17, (4, 4), "tova", {}),
    "h2o_of_a_standard_model": (3, 0, 17, (4, 4), "h2o", STANDARD),
    "ragged_in_two_blocks_of_queries": (9, 0, 75, (2, 2), "tova", {}),
    "some_held_before_in_any_order": (5, 21, 30, (4, 2), "h2o", {}),
    "several_spans_of_columns": (2, 600, 40, (4, 1), "tova", {}),
    "heads_of_one_sequence_below_one_another": (1, 0, 40, (8, 8), "tova", {}),
    "two_registers_of_sequences": (32, 0, 20, (1, 1), "h2o", {}),
    "heads_of_128": (2, 5, 20, (2, 1), "tova", {"width": 128}),
    "normalised": (3, 21, 30, (4, 4), "h2o-normalised", {}),
    "own_head": (3, 21, 30, (3, 3), "tova", {"selection": "own_head"}),
    "unprotected_bos": (3, 20, 30, (2, 2), "tova", {"selection": "unprotected_bos"}),
    "unprotected_self": (3, 20, 30, (2, 2), "h2o", {"selection": "unprotected_self"}),
    "bfloat16": (3, 20, 30, (4, 2), "tova", {"dtype": "bfloat16"}),
    "logits_beyond_the_bound": (3, 20, 30, (2, 2), "tova", {"times": 40}),
}
QUICK = "some_held_before_in_any_order", "own_head"


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_times_f_and_scores_are_those_of_the_scan(case):
    batch, num_held, length, heads, name, changes = CASES[case]
    changes = dict(changes)
    width, dtype, factor = changes.pop("width", 8), changes.pop("dtype", "float32"), changes.pop("times", 1)
    rng = np.random.default_rng(length)
    columns, q, arriving = held_and_new(rng, batch, num_held, length, width, heads)
    q, k = (factor * q).astype(dtype), columns.k.astype(dtype)
    score = jnp.where(columns.position < arriving.start[:, None], rng.random(columns.position.shape), 0)
    columns = columns._replace(k=k, v=k, score=score.astype(jnp.float32))
    q_sel, k_sel = q[:, :, 0], k[:, :, 0]
    if "selection" in changes and changes["selection"] == "own_head":
        q_sel, k_sel = q_sel[:, ::-1], k_sel * 0.9
        columns = columns._replace(k_sel=k_sel)
    columns = columns._replace(f=None) if changes == STANDARD else columns

    # Where it is not, the kernel is not what is compared.
    assert weights_kernel.bounded(q, k, columns.position, Rule(width**-0.5)) == (factor == 1)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMISED)
    def run(attention, columns, q, q_sel, k_sel, arriving):
        config = config_of(attention, width, heads[0], num_kv_heads=heads[1], **changes)
        return evict(POLICIES[name], config, columns, q, q_sel, k_sel, arriving, None)

    with jax.default_matmul_precision("highest"):
        (hidden_at, after), (expected, columns) = (
            run(a, columns, q, q_sel, k_sel, arriving) for a in ("pallas", "reference")
        )
    assert (np.asarray(expected) != NEVER).any()
    np.testing.assert_array_equal(hidden_at, expected)
    np.testing.assert_array_equal(after.position, columns.position)
    held = np.asarray(after.position) > 0
    np.testing.assert_allclose(after.score[held], columns.score[held], rtol=1e-4, atol=1e-6)
    if columns.f is not None:
        np.testing.assert_allclose(after.f[held], columns.f[held], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("tova", {}), *(pytest.param(n, c, marks=pytest.mark.slow) for n, c in (("h2o", {}), ("h2o-per-head", STANDARD)))],
    ids=str,
)
def test_a_layer_evicts_and_attends_as_plain_python_does_with_a_budget_for_every_row(name, changes):
    length, budgets, rng = 14, [2, 3, 5, 13, 14], np.random.default_rng(0)
    q = rng.normal(size=(len(budgets), length, 4, 8)).astype(np.float32) * 2
    k, v = rng.normal(size=(2, len(budgets), length, 2, 8)).astype(np.float32)  # grouped heads
    zeros = jnp.zeros(len(budgets), jnp.int32)
    arriving = Arriving(zeros, zeros + length, jnp.array(budgets), 0)
    config = config_of("pallas", heads=4, num_kv_heads=2, **changes)
    run = jax.jit(functools.partial(attend_evicting, POLICIES[name], config, None), compiler_options=UNOPTIMISED)
    out, _, hidden_at = run(Projections(q, k, v, None, None), arriving)
    groups = 2 if POLICIES[name].per_head else 1
    for row, budget in enumerate(budgets):
        for group in range(groups):
            mine = slice(group * 4 // groups, (group + 1) * 4 // groups)
            keys = slice(group * 2 // groups, (group + 1) * 2 // groups)
            arrays = q[row][:, mine], k[row][:, keys], v[row][:, keys]
            policy = POLICIES[name.removesuffix("-per-head")]
            expected, gone = oracle_layer(policy, budget, *arrays, selective=not changes)
            assert gone == {j: int(i) for j, i in enumerate(hidden_at[row * groups + group]) if i < length}
            assert len(gone) == length - budget
            np.testing.assert_allclose(out[row][:, mine], expected, atol=2e-5)
