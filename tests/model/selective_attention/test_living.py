"""Attention to living keys is attention to all of them, to rounding; and the dead really go."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from selective_attention.attention import Selection, selective_attention
from selective_attention.implementations import blockwise
from selective_attention.parallel import sharded_selective_attention, zigzag_positions
from tests.support.attention_oracle import make_inputs
from tests.support.bundled import attend

LENGTH = 700  # six blocks


def arrays_of(seed=0, *, selecting=1.0, batch=2, heads=2):
    """q, k, v of bounded logits, and a selecting pair: key j gets about `selecting` times a factor of its own."""
    q, k, v = make_inputs(seed, batch, LENGTH, heads, 1, 8, dtype=np.float32)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    rng = np.random.default_rng(seed + 1)
    k_sel = np.broadcast_to(selecting * rng.exponential(size=(batch, LENGTH, 1)) ** 2, (batch, LENGTH, 8))
    q_sel = rng.uniform(size=(batch, LENGTH, 8))
    return {"q": 3 * q, "k": k, "v": v, "q_sel": q_sel.astype(np.float32), "k_sel": k_sel.astype(np.float32)}


def value_and_gradients(arrays, **options):
    def loss(arrays):
        out = selective_attention(**arrays, scale=1.0, implementation="xla", **options)
        out, forgotten = out if isinstance(out, tuple) else (out, jnp.zeros(1))
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(weight * out) + jnp.mean(forgotten**2), (out, forgotten)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def assert_same(arrays, tolerances=(5e-6, 1e-5), **options):
    """Living keys and all keys give the same; the tolerances are relative to the largest entry."""
    ((_, outputs), gradients) = value_and_gradients(arrays, **options)
    ((_, expected), exact) = value_and_gradients(arrays, logit_bound=math.inf, **options)
    pairs = [(tolerances[0], *x) for x in zip(outputs, expected, strict=True)]
    pairs += [(tolerances[1], gradients[name], exact[name]) for name in arrays]
    for tolerance, one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(0.1, np.abs(other).max()))


@pytest.fixture
def layouts(monkeypatch):
    """(blocks of living keys, blocks of the sequence that they are left of) at each block of queries that is run."""
    seen, original = [], blockwise.shortened

    def shortened(*args):
        layout, f_JC, first = original(*args)
        jax.debug.callback(lambda *n: seen.append(tuple(map(int, n))), layout.listed, layout.taken)
        return layout, f_JC, first

    monkeypatch.setattr(blockwise, "shortened", shortened)
    return seen


def segments():
    """Packed documents: some end within a block of queries, the last is padding."""
    position = np.arange(LENGTH)
    return np.stack([np.searchsorted([130, 390], position, "right"), np.where(position < 600, 0, -1)]).astype(np.int32)


def evictions():
    rng = np.random.default_rng(3)
    late = np.arange(LENGTH) + rng.integers(1, 300, (2, LENGTH))
    return np.where(rng.random((2, LENGTH)) < 0.7, late, LENGTH).astype(np.int32)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"memory_tau": 0.7}, id="plain"),
        pytest.param({"memory_tau": 0.7, "segment_ids": segments()}, id="packed"),
        pytest.param({"evict_at": evictions()}, id="evicted"),
        pytest.param({"memory_tau": 60.0}, id="late tau", marks=pytest.mark.slow),
        pytest.param(
            {"selection": Selection.OFF, "segment_ids": segments()}, id="standard packed", marks=pytest.mark.slow
        ),
        pytest.param({"selection": Selection.UNPROTECTED_BOS}, id="unprotected", marks=pytest.mark.slow),
    ],
)
def test_the_dead_are_dropped_and_missed_by_nobody(options, layouts):
    assert_same(arrays_of(), **options)
    jax.effects_barrier()
    assert any(listed < taken for listed, taken in layouts)


def test_where_nothing_is_forgotten_nothing_moves_and_every_bit_is_the_same(layouts):
    assert_same(arrays_of(selecting=1e-3), tolerances=(0, 0), memory_tau=0.7)
    jax.effects_barrier()
    assert set(layouts) == {(0, 0)}


@pytest.mark.slow
def test_the_same_is_computed_every_time():
    once, again = (value_and_gradients(arrays_of()) for _ in range(2))
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_huge_logits_keep_keys_that_a_small_bound_would_drop():
    """Beside logits of +-10,000, F of some hundreds decides nothing."""
    arrays = arrays_of(heads=1)
    assert_same({**arrays, "q": 3e3 * arrays["q"]})


@pytest.mark.slow
def test_a_rule_that_gives_back_what_it_took_drops_nothing(layouts):
    assert_same(arrays_of(batch=1), selection=Selection.LEAKY, evict_at=np.full((1, LENGTH), LENGTH, np.int32))
    jax.effects_barrier()
    assert set(layouts) == {(0, 0)}


def test_a_query_that_may_not_see_itself_keeps_all_that_it_may_see():
    """It may see only masked keys, among which the least masked counts."""
    evict_at = np.full((1, LENGTH), LENGTH, np.int32)
    evict_at[0, 0], evict_at[0, 500:] = 1, np.arange(500, LENGTH)
    assert_same(arrays_of(batch=1), evict_at=evict_at)


def test_a_block_of_queries_drops_what_earlier_ones_forgot(layouts):
    """What context parallelism does: an offset that is traced, and F at the first query."""
    arrays, rows = arrays_of(batch=1), slice(256, LENGTH)

    def run(bound):
        def loss(q, k, v, q_sel, k_sel, f_start, offset):
            told = {"offset": offset, "q_segment_ids": None, "kv_segment_ids": None}
            rule = {"scale": 1.0, "selection": Selection.PAPER, "tau": 0.7, "logit_bound": bound}
            out, forgotten = attend(blockwise, q, k, v, q_sel, k_sel, f_start, **told, **rule)
            return jnp.sum(jnp.cos(jnp.arange(out.size)).reshape(out.shape) * out) + jnp.mean(forgotten**2)

        f_start = jnp.where(jnp.arange(LENGTH) < 256, 1e3 * (jnp.arange(LENGTH) % 9 > 0), 0.0)[None]
        of_queries = (arrays[name][:, rows] if name[0] == "q" else arrays[name] for name in arrays)
        return jax.jit(jax.value_and_grad(loss, argnums=range(6)))(*of_queries, f_start, jnp.int32(256))

    for one, other in zip(jax.tree.leaves(run(None)), jax.tree.leaves(run(math.inf)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(0.1, np.abs(other).max()))
    jax.effects_barrier()
    assert any(listed < taken for listed, taken in layouts)


@pytest.mark.parametrize("logit_bound", [None, math.inf], ids=["dropped", "kept"])
def test_on_a_context_axis_it_is_the_definition_in_float64(logit_bound, layouts):
    """To far less than float32 could show: there an F that rounding takes past tau moves the gradients by 0.1%."""
    mesh, order = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Explicit,)), zigzag_positions(LENGTH, 2)

    def gradients(attend, arrays, **options):
        def loss(arrays):
            out, forgotten = attend(**arrays, scale=1.0, memory_tau=0.7, **options)
            return jnp.mean((out - jnp.cos(arrays["q"])) ** 2) + jnp.mean(forgotten**2)

        return jax.jit(jax.grad(loss))(arrays)

    with jax.enable_x64():
        arrays = {name: np.asarray(x, np.float64) for name, x in arrays_of(batch=1).items()}
        expected = gradients(selective_attention, arrays, implementation="reference")
        with jax.set_mesh(mesh):
            placed = {name: jax.device_put(x[:, order], P(None, "context")) for name, x in arrays.items()}
            made = gradients(sharded_selective_attention, placed, implementation="xla", logit_bound=logit_bound)
        for name, gradient in made.items():
            exact = np.asarray(expected[name])[:, order]
            np.testing.assert_allclose(gradient, exact, rtol=0, atol=1e-12 * np.abs(exact).max())
    jax.effects_barrier()
    assert any(listed < taken for listed, taken in layouts) == (logit_bound is None)
