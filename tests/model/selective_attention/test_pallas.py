"""The TPU kernels, interpreted on CPU, against the reference implementation in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from selective_attention.implementations import reference
from selective_attention.implementations.tpu import attend as pallas_tpu
from selective_attention.implementations.tpu import plan as pallas_tpu_plan
from selective_attention.selection import Selection
from tests.support.bundled import attend, column_sums

CASES = {
    "one_block": {"length": 17},
    "grouped_heads_and_padding": {"length": 300, "heads": 4, "kv_heads": 2, "tau": 1.0},
    "odd_heads": {"length": 130, "heads": 3, "kv_heads": 3},
    "one_sequence_in_two_groups_of_heads": {"length": 130, "batch": 1, "heads": 4, "kv_heads": 4},
    "one_kv_head_in_segments": {"length": 260, "heads": 3, "segments": True, "tau": 2.0},
    "wide_heads_in_segments": {"length": 260, "width": 128, "segments": True},
    "narrow_values_and_evictions": {"length": 260, "width": 16, "value_width": 8, "evict": True, "tau": 1.0},
    "own_projections": {"length": 130, "select_width": 24, "selection": Selection.OWN_HEAD},
    "unprotected_bos": {"length": 130, "selection": Selection.UNPROTECTED_BOS},
    "unprotected_self": {"length": 130, "selection": Selection.UNPROTECTED_SELF},
    "leaky": {"length": 260, "selection": Selection.LEAKY},
    "off": {"length": 260, "selection": Selection.OFF, "tau": 1.0},
    "logits_beyond_the_bound": {"length": 260, "factor": 8.0},
}


def make(
    length,
    *,
    batch=2,
    heads=2,
    kv_heads=1,
    width=64,
    value_width=None,
    select_width=None,
    segments=False,
    evict=False,
    factor=1.0,
    selection=Selection.PAPER,
    tau=None,
):
    """Arrays and options of `attend`, in float64 or int32."""
    rng = np.random.default_rng(length)
    q = rng.normal(size=(batch, length, heads, width)) * factor
    k = rng.normal(size=(batch, length, kv_heads, width))
    v = rng.normal(size=(batch, length, kv_heads, value_width or width))
    q_sel, k_sel = q[:, :, 0], k[:, :, 0]
    if select_width:
        q_sel, k_sel = (rng.normal(size=(batch, length, select_width)) for _ in range(2))
    ids = None
    if segments:
        ids = np.sort(rng.integers(0, 3, size=(batch, length)), axis=1).astype(np.int32)
        ids[:, -5:] = -1
    options = {
        "offset": 0,
        "evict_at": rng.integers(length // 2, 2 * length, size=(batch, length)).astype(np.int32) if evict else None,
        "q_segment_ids": ids,
        "kv_segment_ids": ids,
        "scale": width**-0.5,
        "selection": selection,
        "tau": tau,
    }
    return [q, k, v, q_sel, k_sel, rng.uniform(size=(batch, length)) / 2], options


def value_and_gradients(module, arrays, options, dtype, runs=1):
    """[out, forgotten or nothing, dq, dk, dv, dq_sel, dk_sel, df_start] for random cotangents; of the last run."""
    dtypes = [dtype] * 5 + [jnp.promote_types(dtype, jnp.float32)]
    arrays = [jnp.asarray(x, d) for x, d in zip(arrays, dtypes, strict=True)]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes all the time
    def run(*arrays):
        results, transpose = jax.vjp(lambda *a: attend(module, *a, **options), *arrays)
        rng = np.random.default_rng(0)
        return results, transpose(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), results))

    made = [[np.asarray(x, np.float64) for x in jax.tree.leaves(run(*arrays))] for _ in range(runs)]
    for again in made[1:]:
        for a, b in zip(made[0], again, strict=True):
            np.testing.assert_array_equal(a, b, "two runs differ")
    return made[-1]


def assert_same(actual, expected, relative):
    """Largest error of each array against its largest entry."""
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert np.abs(a - e).max() <= relative * max(np.abs(e).max(), 1e-30), f"result {n}"


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_in_float32(case):
    arrays, options = make(**CASES[case])
    actual = value_and_gradients(pallas_tpu, arrays, options, jnp.float32)
    with jax.enable_x64():
        expected = value_and_gradients(reference, arrays, options, jnp.float64)
    assert_same(actual[:1], expected[:1], 5e-6)
    assert_same(actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grouped_heads_and_padding", "logits_beyond_the_bound"])
def test_values_and_gradients_in_bfloat16_twice_the_same(case):
    arrays, options = make(**CASES[case])
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays[:5]] + arrays[5:]
    actual = value_and_gradients(pallas_tpu, arrays, options, jnp.bfloat16, runs=2)
    with jax.enable_x64():
        expected = value_and_gradients(reference, arrays, options, jnp.float64)
    assert_same(actual, expected, 2e-2)


def test_head_0_selects_where_no_projections_are_given():
    arrays, options = make(**CASES["grouped_heads_and_padding"])
    q, k, v, *_, f_start = (jnp.asarray(x, jnp.float32) for x in arrays)

    @functools.partial(jax.jit, static_argnums=0)
    def run(apart, q, k, v):
        def loss(q, k, v):
            selecting = (q[:, :, 0], k[:, :, 0]) if apart else (None, None)
            return jnp.sum(jnp.sin(attend(pallas_tpu, q, k, v, *selecting, f_start, **options)[0]))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    actual, expected = (jax.tree.leaves(run(apart, q, k, v)) for apart in (False, True))
    assert_same(*([np.asarray(x) for x in results] for results in (actual, expected)), 1e-6)


def test_a_logit_bound_that_is_given_decides_whether_there_is_a_running_maximum():
    arrays, options = make(130, factor=80.0)
    q, k, v, *_, f_start = (jnp.asarray(x, jnp.float32) for x in arrays)
    bounded = jax.jit(lambda bound: attend(pallas_tpu, q, k, v, None, None, f_start, logit_bound=bound, **options)[0])
    assert np.isfinite(bounded(1e9)).all()
    assert not np.isfinite(bounded(1.0)).all()  # a false promise: exp2 overflows


@pytest.mark.parametrize("first_leaves", [False, True])
def test_without_a_running_maximum_no_sum_vanishes_while_the_first_key_stays(first_leaves):
    arrays, options = make(130, selection=Selection.OWN_HEAD)
    arrays[3] *= 30  # F hides far more than float32 can tell from nothing
    arrays[5][:, 0] = 0
    evict_at = np.random.default_rng(0).integers(0, 130, size=(2, 130)).astype(np.int32)  # some before their own query
    evict_at[:, 0] = 100 if first_leaves else 130
    options["evict_at"] = evict_at

    def run(*arrays, **bound):
        unoptimised = {"xla_backend_optimization_level": 0}
        attends = jax.jit(functools.partial(attend, pallas_tpu, **options, **bound), compiler_options=unoptimised)
        return attends(*(jnp.asarray(x, jnp.float32) for x in arrays))[0]

    with jax.enable_x64():
        expected = attend(reference, *(jnp.asarray(x) for x in arrays), **options)[0]
    assert_same([np.asarray(run(*arrays))], [np.asarray(expected)], 5e-6)
    falsely_bounded = run(arrays[0] * 80, *arrays[1:], logit_bound=1.0)
    assert np.isfinite(falsely_bounded).all() == first_leaves


@pytest.mark.slow
def test_chunks_of_queries_with_their_carries_equal_the_whole():
    arrays, options = make(384, heads=2, tau=1.0)
    q, k, v, q_sel, k_sel, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    zeros = jnp.zeros(k.shape[:2])
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def whole(q, k, v, q_sel, k_sel):
        out, forgotten = attend(pallas_tpu, q, k, v, q_sel, k_sel, zeros, **options)
        return jnp.sum(weight * out) + jnp.sum(jnp.sin(forgotten)), out

    @jax.jit
    def in_chunks(arguments, boundary):
        def loss(q, k, v, q_sel, k_sel):
            f_start, outs, forgottens = zeros, [], []
            for rows, offset in ((slice(0, 256), 0), (slice(256, 384), boundary)):
                chunk = {name: options[name] for name in ("q_segment_ids", "kv_segment_ids", "scale", "selection")}
                chunk["offset"] = offset
                out, forgotten = attend(
                    pallas_tpu, q[:, rows], k, v, q_sel[:, rows], k_sel, f_start, evict_at=None, tau=1.0, **chunk
                )
                f_start = f_start + column_sums(pallas_tpu, q_sel[:, rows], k_sel, **chunk)
                outs.append(out)
                forgottens.append(forgotten)
            out = jnp.concatenate(outs, 1)
            return jnp.sum(weight * out) + jnp.sum(jnp.sin(jnp.concatenate(forgottens, 1))), out

        return jax.value_and_grad(loss, argnums=range(5), has_aux=True)(*arguments)

    arguments = (q, k, v, q_sel, k_sel)
    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(whole, argnums=range(5), has_aux=True))(*arguments)
    (_, actual), gradients = in_chunks(arguments, jnp.int32(256))
    assert_same([np.asarray(actual)], [np.asarray(expected)], 5e-6)
    assert_same([np.asarray(x) for x in gradients], [np.asarray(x) for x in expected_gradients], 1e-5)


@pytest.mark.slow
def test_backward_in_chunks_of_queries(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "most_queries", lambda *_: 1)  # one block of queries a chunk
    arrays, options = make(**CASES["one_kv_head_in_segments"])
    actual = value_and_gradients(pallas_tpu, arrays, options, jnp.float32)
    with jax.enable_x64():
        expected = value_and_gradients(reference, arrays, options, jnp.float64)
    assert_same(actual, expected, 1e-5)


@pytest.mark.slow
def test_the_kernels_have_tiles_of_different_sizes(monkeypatch):
    monkeypatch.setattr(pallas_tpu_plan, "ELSEWHERE", pallas_tpu_plan.Tiling(256, 256, 256, 128, 2**24))
    arrays, options = make(**CASES["grouped_heads_and_padding"])
    actual = value_and_gradients(pallas_tpu, arrays, options, jnp.float32)
    with jax.enable_x64():
        expected = value_and_gradients(reference, arrays, options, jnp.float64)
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "sides"),
    [
        (8192, 8192, (512, 256)),
        (768, 2048, (256, 256)),
        (300, 300, (512, 256)),
        (640, 640, (256, 256)),
        (17, 17, (128,) * 2),
    ],
)
def test_tiles_are_as_large_as_they_may_be_without_more_padding(queries, keys, sides):
    assert pallas_tpu_plan.blocks(pallas_tpu_plan.TILINGS["v4"], jnp.bfloat16, queries, keys) == sides


@pytest.mark.slow
def test_rounding_errors_of_f_do_not_grow_with_the_length():
    length, tau = 8192, 1e9  # with such a tau, forgotten is the sum of a row of F
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, length, 1, 64)), jnp.bfloat16) for _ in range(2))
    _, options = make(1, batch=1, tau=tau)
    selecting = jax.jit(
        lambda q, k: attend(pallas_tpu, q, k, k, q[:, :, 0], k[:, :, 0], jnp.zeros((1, length)), **options)
    )
    forgotten = tau * np.asarray(selecting(q, k)[1], np.float64)[0]
    logits = np.asarray(q[0, :, 0], np.float64) @ np.asarray(k[0, :, 0], np.float64).T / 8
    s = np.maximum(logits, 0) * np.tri(length, k=-1)
    s[:, 0] = 0
    f_rows = ((np.cumsum(s, axis=0) - s) * np.tri(length)).sum(axis=1)
    errors = np.abs(forgotten[3:] - f_rows[3:]) / f_rows[3:]
    assert errors[:1021].max() < 1e-6
    assert errors[-1024:].max() < 1e-6


@pytest.mark.slow
def test_gradients_have_no_races_on_two_cores(capfd):
    """TPU interpret mode: VMEM, DMAs and the order of the grid are simulated, and unwritten memory reads as NaN."""
    arrays, options = make(130, heads=2, tau=1.0)
    with jax.enable_x64():
        expected = value_and_gradients(reference, arrays, options, jnp.float64)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        actual = value_and_gradients(pallas_tpu, arrays, options, jnp.float32)
    assert_same(actual, expected, 1e-5)
    assert "RACE" not in capfd.readouterr().out


def test_a_head_that_is_too_wide_is_refused():
    arrays, options = make(16, width=160)
    with pytest.raises(ValueError, match="up to 128"):
        attend(pallas_tpu, *(jnp.asarray(x, jnp.float32) for x in arrays), **options)
