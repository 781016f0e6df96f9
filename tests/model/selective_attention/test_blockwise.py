"""The blockwise implementation against the float64 oracle and the float64 gradients of the reference."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import RULES, make_inputs, streaming
from bundled import attend, column_sums
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_attention.attention import Selection, selective_attention
from selective_attention.implementations import blockwise, reference

NAMES = ["q", "k", "v", "q_sel", "k_sel"]


def make_arrays(seed, dtype=np.float32, separate=True, **shape):
    q, k, v = make_inputs(seed, **shape)
    arrays = {"q": q, "k": k, "v": v}
    if separate:
        rng = np.random.default_rng(seed + 1)
        arrays |= {name: rng.normal(size=(*q.shape[:2], 8)) for name in ("q_sel", "k_sel")}
    return {name: np.asarray(array, dtype) for name, array in arrays.items()}


def packed(batch, length, seed=9):
    """Segment ids of a few documents, padding at the end of the last row, and eviction times."""
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(0, 3, size=(batch, length)), axis=1).astype(np.int32)
    segment_ids[-1, length - length // 4 :] = -1
    evict_at = np.where(rng.random((batch, length)) < 0.3, np.arange(length) + length // 3 + 1, length)
    return {"segment_ids": segment_ids, "evict_at": evict_at.astype(np.int32)}


def value_and_gradients(arrays, implementation, **options):
    """(out, forgotten) and the gradients of a loss in which all their entries count differently."""

    def loss(arrays):
        out, forgotten = selective_attention(**arrays, memory_tau=0.7, implementation=implementation, **options)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(weight * out) + jnp.mean(forgotten**2), (out, forgotten)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs, gradients


def assert_matches_float64(arrays, *, output_tolerance=5e-6, gradient_tolerance=1e-5, **options):
    """The tolerances are relative to the largest entry of each array."""
    rule = RULES[str(options.get("selection", "paper"))]
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    outputs, gradients = value_and_gradients(arrays, "xla", **options)
    expected = streaming(
        **wide, rule=rule, tau=0.7, **{name: x for name, x in options.items() if name in ("segment_ids", "evict_at")}
    )
    with jax.enable_x64():
        _, expected_gradients = value_and_gradients(wide, "reference", **options)
    for name, actual, exact in zip(("out", "forgotten"), outputs, expected, strict=True):
        assert_close(actual, exact, output_tolerance, name)
    assert outputs[0].dtype == arrays["q"].dtype
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype
        assert_close(gradient, expected_gradients[name], gradient_tolerance, name)


def assert_close(actual, expected, tolerance, name=""):
    """Relative to the largest entry; to 0.1 where all entries are less (a single visible key: exactly no gradient)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    largest = max(np.abs(expected).max(), 0.1)
    error = np.abs(actual - expected).max()
    assert error <= tolerance * largest, f"{name}: an error of {error}, largest entry {largest}"


@pytest.mark.parametrize("length", [1, 2, 17, 128, 513, 1024])
def test_outputs_and_gradients_equal_float64(length):
    arrays = make_arrays(length, length=length, heads=2, width=8)
    assert_matches_float64(arrays)


@pytest.mark.parametrize("length", [1, 17, 513])
def test_grouped_heads_packed_and_pruned_equal_float64(length):
    arrays = make_arrays(length, length=length, heads=6, kv_heads=2, width=8)
    assert_matches_float64(arrays, **packed(2, length))


@pytest.mark.parametrize("kv_heads", [12, 1])
def test_head_zero_of_twelve_selects_for_all(kv_heads):
    arrays = make_arrays(3, separate=False, length=150, heads=12, kv_heads=kv_heads, width=8)
    assert_matches_float64(arrays)


@pytest.mark.parametrize("selection", Selection)
def test_every_rule_equals_float64(selection):
    arrays = make_arrays(4, length=140, heads=2, width=8)
    outputs, gradients = value_and_gradients(arrays, "xla", selection=selection, **packed(2, 140))
    if selection is Selection.OFF:
        np.testing.assert_array_equal(outputs[1], 0)
        assert all(not np.any(gradients[name]) for name in ("q_sel", "k_sel"))
    else:
        assert_matches_float64(arrays, selection=selection, **packed(2, 140))


def test_off_equals_standard_attention():
    arrays = make_arrays(2, separate=False, length=140, heads=2, width=8)
    out = selective_attention(**arrays, selection=Selection.OFF, implementation="xla")
    q, k, v = map(jnp.array, arrays.values())
    assert_close(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), 2e-6)


def test_bfloat16_is_within_its_precision():
    arrays = make_arrays(5, jnp.bfloat16, length=140, heads=4, kv_heads=2, width=16)
    assert_matches_float64(arrays, output_tolerance=2e-2, gradient_tolerance=2e-2)


def test_values_may_have_another_width():
    arrays = make_arrays(6, length=140, heads=2, width=8, value_width=5)
    assert_matches_float64(arrays)


@pytest.mark.parametrize("length", [1, 140])
def test_rows_that_see_nothing_are_zero_and_huge_logits_are_finite(length):
    arrays = make_arrays(7, length=length, heads=2, width=8)
    evict_at = np.zeros((2, length), np.int32)  # the first sequence sees nothing
    evict_at[1] = length
    outputs, gradients = value_and_gradients(arrays, "xla", scale=1e4, evict_at=evict_at)
    assert all(not np.any(x[0]) for x in (*outputs, *gradients.values()))
    assert all(np.isfinite(x).all() for x in (*outputs, *gradients.values()))
    assert np.any(gradients["v"][1])


@pytest.mark.parametrize(
    ("offset", "length", "selection"), [(0, 90, "paper"), (90, 90, "paper"), (299, 1, "paper"), (150, 150, "off")]
)
def test_a_block_of_queries_equals_the_same_rows_of_the_whole(offset, length, selection):
    """What context parallelism relies on; the offset is traced, and f_start has a gradient."""
    arrays = make_arrays(8, np.float64, length=300, heads=2, width=8)
    extra, selection = packed(2, 300), Selection(selection)
    rows = slice(offset, offset + length)
    before = slice(0, offset or 1)  # an empty block is not asked for: its carry is multiplied by zero

    def through(implementation):
        def rows_from_carry(arrays, offset):
            options = {"scale": 0.4, "selection": selection, "kv_segment_ids": extra["segment_ids"]}
            f_start = (rows.start > 0 and selection is not Selection.OFF) * column_sums(
                implementation,
                arrays["q_sel"][:, before],
                arrays["k_sel"],
                offset=0 * offset,
                q_segment_ids=extra["segment_ids"][:, before],
                **options,
            )
            return attend(
                implementation,
                arrays["q"][:, rows],
                arrays["k"],
                arrays["v"],
                arrays["q_sel"][:, rows],
                arrays["k_sel"],
                f_start,
                offset=offset,
                evict_at=extra["evict_at"],
                q_segment_ids=extra["segment_ids"][:, rows],
                tau=0.7,
                **options,
            )

        def loss(arrays, offset):
            outputs = rows_from_carry(arrays, offset)
            out, forgotten = outputs
            return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out) + jnp.sum(forgotten**2), outputs

        gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(arrays, jnp.int32(offset))
        return outputs, gradients

    with jax.enable_x64():
        outputs, gradients = through(blockwise)
        _, expected_gradients = through(reference)
    expected = streaming(**arrays, scale=0.4, rule=RULES[selection.value], tau=0.7, **extra)
    for actual, exact in zip(outputs, expected, strict=True):
        assert_close(actual, exact[:, rows], 1e-12)
    for name in NAMES:
        assert_close(gradients[name], expected_gradients[name], 1e-12, name)


def test_accumulation_does_not_lose_precision_with_length():
    """S of about 0.4 an entry over 8,192 queries; the largest F is in the thousands."""
    rng = np.random.default_rng(0)
    q_sel, k_sel = (rng.normal(size=(1, 8192, 16)).astype(np.float32) for _ in range(2))
    options = {"q_segment_ids": None, "kv_segment_ids": None, "scale": 0.25, "selection": Selection.PAPER}
    sums = jax.jit(lambda q, k: column_sums(blockwise, q, k, offset=0, **options))(q_sel, k_sel)
    exact = np.zeros(8192)
    for start in range(0, 8192, 512):
        rows = np.arange(start, start + 512)
        s = np.maximum(0.25 * q_sel[0, rows].astype(np.float64) @ k_sel[0].astype(np.float64).T, 0)
        exact += np.where(rows[:, None] > np.arange(8192), s, 0).sum(0)
    exact[0] = 0
    assert exact.max() > 2000
    assert_close(sums[0], exact, 1e-6)


def test_vmap_equals_a_loop():
    stacked = [make_arrays(seed, length=40, heads=2, width=8) for seed in range(3)]
    arrays = {name: np.stack([x[name] for x in stacked]) for name in NAMES}

    def gradients(arrays):
        return jax.grad(lambda a: jnp.sum(selective_attention(**a, implementation="xla") ** 2))(arrays)

    together = jax.jit(jax.vmap(gradients))(arrays)
    gradients = jax.jit(gradients)
    for index, one in enumerate(stacked):
        for name, gradient in gradients(one).items():
            assert_close(together[name][index], gradient, 1e-6, name)


@jax.jit
def selected_mask(q_sel, k_sel):
    """F read off from the outputs, [N, N]: one head whose own logits are zero, values the unit vectors."""
    length = q_sel.shape[1]
    q = jnp.zeros((1, length, 1, 4), jnp.float32)
    v = jnp.eye(length, dtype=jnp.float32)[None, :, None, :]
    weights = selective_attention(q, q, v, q_sel=q_sel, k_sel=k_sel, scale=1.0, implementation="xla")[0, :, 0]
    return -jnp.log(weights / weights[:, :1])  # F[i, 0] = 0, so that column 0 is the unit


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([3, 9, 130]), st.floats(0.1, 1.0))
def test_invariants_of_the_mask(seed, length, spread):
    rng = np.random.default_rng(seed)
    # Few and small selections, so that F can be read from weights that are not rounded to zero.
    q_sel = rng.normal(size=(1, length, 3)).astype(np.float32) * np.float32(spread)
    q_sel *= rng.random((1, length, 1)) < min(1, 8 / length)
    k_sel = rng.normal(size=(1, length, 3)).astype(np.float32)
    lower = np.tri(length, dtype=bool)
    mask = np.where(lower, selected_mask(q_sel, k_sel), 0)
    assert np.all(mask[lower] >= -1e-4), "attention is never boosted"
    np.testing.assert_allclose(np.diag(mask), 0, atol=1e-4, err_msg="a token is never hidden from itself")
    np.testing.assert_allclose(np.diag(mask, -1), 0, atol=1e-4, err_msg="nor from the next token")
    fell = (np.diff(mask, axis=0) < -1e-3) & lower[:-1]
    assert not fell.any(), "what is masked stays masked"
    changed = q_sel.copy()
    changed[:, -1] += 1
    after = np.where(lower, selected_mask(changed, k_sel), 0)
    np.testing.assert_array_equal(after, mask, err_msg="the last token acts on nobody")


def test_nothing_of_size_n_by_n_is_compiled():
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in make_arrays(0, length=2048, batch=1).items()}

    def loss(arrays):
        out, forgotten = selective_attention(**arrays, memory_tau=1.0, implementation="xla")
        return jnp.sum(out) + jnp.sum(forgotten)

    text = jax.jit(jax.grad(loss)).lower(arrays).compile().as_text()
    sizes = [np.prod([int(n) for n in dimensions.split(",")]) for dimensions in re.findall(r"\w\d+\[([\d,]+)\]", text)]
    assert max(sizes) < 2048 * 2048 / 8
    assert "2048,2048" not in text


def test_temporaries_grow_with_length_not_with_its_square():
    def temporaries(implementation, length):
        def loss(arrays):
            return jnp.sum(selective_attention(**arrays, implementation=implementation) ** 2)

        q = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower({"q": q, "k": q, "v": q}).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    longest = temporaries("xla", 8192)
    assert longest < temporaries("reference", 8192) / 20
    assert longest < 4.5 * temporaries("xla", 2048)
