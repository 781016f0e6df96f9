"""The reference implementation and the definition of F, against plain float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selective_attention.attention import Selection, selection_mask, selective_attention
from selective_attention.selection import forgotten_above
from tests.support.attention_oracle import RULES, literal, literal_mask, make_inputs, streaming

SEGMENTS = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 5, 5, 5, 5, 5, 5, -1, -1]], np.int32)
EVICT_AT = np.array([[9, 3, 4, 9, 6, 9, 9, 9, 9], [9, 2, 9, 9, 9, 7, 7, 9, 9]], np.int32)


def selecting_pair(seed=0, batch=3, length=9, width=5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(batch, length, width)).astype(dtype) for _ in range(2))


def assert_close(actual, expected, relative):
    """Largest error against the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.abs(actual - expected).max() <= relative * max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize("selection", Selection)
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS[[0, 1, 0]]], ids=["one_document", "packed"])
def test_mask_equals_the_definition(selection, segment_ids):
    q, k = selecting_pair(dtype=np.float32)
    mask = selection_mask(jnp.array(q), jnp.array(k), scale=0.7, segment_ids=segment_ids, selection=selection)
    rule = RULES[selection.value]
    assert mask.dtype == jnp.float32
    expected = literal_mask(q.astype(np.float64), k.astype(np.float64), 0.7, segment_ids, rule)
    same = np.ones_like(expected, bool)
    if segment_ids is not None:  # F between segments is never read
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids >= 0)[:, None, :]
    assert_close(np.where(same, mask, 0), np.where(same, expected, 0), 1e-6)


def wrong_sum_over_keys(q, k):
    s = strictly_lower_relu(q, k)
    return np.cumsum(s, axis=2) - s


def wrong_no_shift(q, k):
    return np.cumsum(strictly_lower_relu(q, k), axis=1)


def wrong_self_mask_after_first_row(q, k):
    s = np.maximum(np.einsum("bnd,bmd->bnm", q, k), 0) * np.tri(q.shape[1])
    s[0] *= 1 - np.eye(q.shape[1])
    s[:, :, 0] = 0
    return np.cumsum(s, axis=1) - s


def wrong_no_bos_protection(q, k):
    s = np.maximum(np.einsum("bnd,bmd->bnm", q, k), 0) * np.tri(q.shape[1], k=-1)
    return np.cumsum(s, axis=1) - s


def strictly_lower_relu(q, k):
    s = np.maximum(np.einsum("bnd,bmd->bnm", q, k), 0) * np.tri(q.shape[1], k=-1)
    s[:, :, 0] = 0
    return s


@pytest.mark.parametrize(
    "wrong",
    [wrong_sum_over_keys, wrong_no_shift, wrong_self_mask_after_first_row, wrong_no_bos_protection],
    ids=lambda wrong: wrong.__name__,
)
def test_mask_differs_from_the_published_mistakes(wrong):
    q, k = selecting_pair()
    lower = np.tri(q.shape[1])
    expected = literal_mask(q, k, 1.0)
    with jax.enable_x64():
        mask = np.asarray(selection_mask(jnp.array(q), jnp.array(k)))
    assert_close(mask, expected, 1e-12)
    assert np.abs(wrong(q, k) * lower - expected).max() > 0.1  # the inputs tell the mistake from the definition


def test_mask_by_hand():
    q = jnp.array([[[1.0], [2.0], [-1.0], [3.0], [1.0]]])
    k = jnp.array([[[1.0], [1.0], [0.5], [-4.0], [1.0]]])
    # S: row 2 gives relu(-1) = 0; row 3 gives 3 to key 1 and 1.5 to key 2; row 4 acts on nobody
    expected = np.zeros((1, 5, 5))
    expected[0, 4, 1:3] = [3.0, 1.5]
    np.testing.assert_array_equal(selection_mask(q, k), expected)


def test_keys_beyond_the_bound_are_missed_by_no_softmax():
    """The worst case: a logit of -b with itself, b with all others, which are only just forgotten."""
    length, bound = 4096, 9.6
    f = np.float32(forgotten_above(bound, length))
    np.testing.assert_allclose(f, 2 * bound + 17 + np.log(length), atol=0.1)
    forgotten_weight = (length - 1) * np.exp(bound - np.float64(f) + bound)
    assert 2**-27 < forgotten_weight < 2**-24
    assert np.float32(1) + np.float32(forgotten_weight) == 1
    assert forgotten_above(bound, length, Selection.LEAKY) == np.inf
    assert forgotten_above(bound, length, dtype=jnp.bfloat16) < f - 10


def test_mask_of_16_bit_inputs_is_float32():
    q, k = (jnp.array(x, jnp.bfloat16) for x in selecting_pair())
    mask = selection_mask(q, k)
    assert mask.dtype == jnp.float32
    assert_close(mask, literal_mask(np.asarray(q, np.float64), np.asarray(k, np.float64), 1.0), 1e-6)


def test_gradient_through_the_mask_equals_finite_differences():
    q, k = selecting_pair(batch=2, length=6, width=3)
    weight = np.random.default_rng(1).normal(size=(2, 6, 6))
    with jax.enable_x64():

        def loss(q, k):
            return jnp.sum(weight * selection_mask(q, k))

        gradients = jax.grad(loss, argnums=(0, 1))(jnp.array(q), jnp.array(k))
    expected = finite_differences(lambda q, k: np.sum(weight * literal_mask(q, k, 1.0)), [q, k])
    for gradient, difference in zip(gradients, expected, strict=True):
        assert_close(gradient, difference, 1e-7)


def finite_differences(function, arrays, step=1e-6):
    """Central differences of a scalar function, one entry at a time."""
    gradients = []
    for n, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            moved = [a.copy() for a in arrays]
            moved[n][index] += step
            above = function(*moved)
            moved[n][index] -= 2 * step
            gradient[index] = (above - function(*moved)) / (2 * step)
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("selection", Selection)
@pytest.mark.parametrize("extra", [{}, {"segment_ids": SEGMENTS, "evict_at": EVICT_AT}], ids=["plain", "packed_pruned"])
def test_reference_equals_the_definition(selection, extra):
    q, k, v = make_inputs(0, length=9, heads=4, kv_heads=2)
    q_sel, k_sel = selecting_pair(seed=5, batch=2, width=3)
    options = {"q_sel": q_sel, "k_sel": k_sel, "scale": 0.9, **extra}
    with jax.enable_x64():
        out, forgotten = selective_attention(
            q, k, v, **options, selection=selection, memory_tau=0.6, implementation="reference"
        )
    expected_out, expected_forgotten = literal(q, k, v, **options, rule=RULES[selection.value], tau=0.6)
    assert_close(out, expected_out, 1e-12)
    if selection is Selection.OFF:
        np.testing.assert_array_equal(forgotten, 0)
    else:
        assert_close(forgotten, expected_forgotten, 1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_two_oracles_agree(rule):
    q, k, v = make_inputs(3, length=9, heads=4, kv_heads=2, value_width=3)
    options = {"scale": 0.8, "segment_ids": SEGMENTS, "evict_at": EVICT_AT, "rule": rule, "tau": 0.5}
    for one, other in zip(literal(q, k, v, **options), streaming(q, k, v, **options), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_head_zero_selects_by_default(kv_heads):
    q, k, v = make_inputs(1, heads=4, kv_heads=kv_heads)
    with jax.enable_x64():
        out = selective_attention(q, k, v, implementation="reference")
    assert_close(out, literal(q, k, v)[0], 1e-12)
    by_last_head = literal(q, k, v, q_sel=q[:, :, -1], k_sel=k[:, :, -1])[0]
    assert np.abs(np.asarray(out) - by_last_head).max() > 1e-2  # another head would have been noticed


def test_off_equals_standard_attention():
    q, k, v = make_inputs(2, dtype=np.float32)
    out = selective_attention(q, k, v, selection=Selection.OFF, implementation="reference")
    expected = jax.nn.dot_product_attention(jnp.array(q), jnp.array(k), jnp.array(v), is_causal=True)
    assert_close(out, expected, 1e-6)


def test_reference_gradients_equal_finite_differences():
    q, k, v = make_inputs(4, length=5, heads=2, kv_heads=1, width=3)
    q_sel, k_sel = selecting_pair(seed=6, batch=2, length=5, width=3)
    segment_ids, weight = SEGMENTS[:, 2:7], np.random.default_rng(8).normal(size=q.shape)

    def oracle_loss(q, k, v, q_sel, k_sel):
        out, forgotten = literal(q, k, v, q_sel=q_sel, k_sel=k_sel, segment_ids=segment_ids, tau=0.7)
        return np.sum(weight * out) + np.sum(forgotten**2)

    def loss(q, k, v, q_sel, k_sel):
        out, forgotten = selective_attention(
            q, k, v, q_sel=q_sel, k_sel=k_sel, segment_ids=segment_ids, memory_tau=0.7, implementation="reference"
        )
        return jnp.sum(weight * out) + jnp.sum(forgotten**2)

    arrays = [q, k, v, q_sel, k_sel]
    with jax.enable_x64():
        gradients = jax.jit(jax.grad(loss, argnums=range(5)))(*map(jnp.array, arrays))
    for gradient, difference in zip(gradients, finite_differences(oracle_loss, arrays), strict=True):
        assert_close(gradient, difference, 1e-7)


def test_padding_gives_zeros_and_is_seen_by_nobody():
    q, k, v = make_inputs(5, length=9, dtype=np.float32)
    options = {"segment_ids": SEGMENTS, "implementation": "reference"}
    out = selective_attention(q, k, v, **options)
    np.testing.assert_array_equal(out[1, 7:], 0)
    k[1, 7:], v[1, 7:] = 1e3, 1e3
    np.testing.assert_array_equal(out[1, :7], selective_attention(q, k, v, **options)[1, :7])


@pytest.mark.parametrize("length", [1, 2, 6])
def test_huge_logits_stay_free_of_nan(length):
    q, k, v = make_inputs(6, length=length, dtype=np.float32)
    evict_at = np.zeros((2, length), np.int32)  # nobody sees anything
    for options in ({}, {"evict_at": evict_at}):

        def loss(q, k, v, options=options):
            out, forgotten = selective_attention(
                q, k, v, scale=1e4, memory_tau=1.0, implementation="reference", **options
            )
            return out.sum() + forgotten.sum()

        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradients)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = make_inputs(7, heads=3)
    with pytest.raises(ValueError, match=r"the 2 key/value heads must divide the 3 query heads"):
        selective_attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="k and v do not fit q"):
        selective_attention(q, k[:, 1:], v[:, 1:])
    with pytest.raises(ValueError, match="both q_sel and k_sel"):
        selective_attention(q, k, v, q_sel=q[:, :, 0])
    with pytest.raises(ValueError, match="segment_ids must be an integer array"):
        selective_attention(q, k, v, segment_ids=np.zeros((2, 7)))
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        selective_attention(q, k, v, implementation="cuda")


def test_own_head_needs_its_own_projections():
    q, k, v = make_inputs(8)
    with pytest.raises(ValueError, match="own_head"):
        selective_attention(q, k, v, selection="own_head")
