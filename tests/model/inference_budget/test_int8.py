"""A cache in int8: what it rounds keys and values to, whichever way they come in, and that it is asked for by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference_budget import (
    POLICIES,
    Budgets,
    Decoder,
    Engine,
    Evaluator,
    GenerationRequest,
    Windows,
    cache_bytes,
    init_pruned_cache,
)
from selective_attention import init_cache
from selective_attention.quantised import as_held, quantise
from selective_attention.slots import slots_as_heads, slots_as_scales
from selective_attention.transformer.decoding import prefill as full_prefill
from tests.model.inference_budget.test_cache import decode_all
from tests.support.small_model import LENGTH, STANDARD, as_int8_holds, make_model, make_tokens

BUDGETS = Budgets((3, 9), LENGTH)
LENGTHS = np.array([15, 1, 8], np.int32)


def test_a_number_is_off_by_half_a_127th_of_its_heads_largest_at_most():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 3, 16)) * np.exp(3 * rng.normal(size=(50, 3, 1)))).astype(np.float32)
    held, scale = as_int8_holds(x)
    np.testing.assert_array_equal(as_held(x, "int8"), held.astype(np.float32))
    # The scale is rounded, too: a largest number of 127.5 scales is cut to 127.
    assert (np.abs(held - x) <= 0.502 * scale).all()
    assert (np.abs(scale[..., 0] * 127 - np.abs(x).max(-1)) <= np.abs(x).max(-1) / 256).all()


def test_zeros_stay_zeros_and_what_is_held_is_held_as_it_is():
    values, scale = quantise(jnp.zeros((2, 4)))
    assert not values.any() and not scale.any()
    once = as_held(jnp.asarray(np.random.default_rng(1).normal(size=(20, 8)), jnp.float32), "int8")
    np.testing.assert_array_equal(as_held(once, "int8"), once)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("selective", {"num_kv_heads": 2}),
        pytest.param("selective", {"selection": "own_head"}, marks=pytest.mark.slow),
        pytest.param("h2o-per-head", {"num_kv_heads": 2, **STANDARD}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_perplexity_is_that_of_decoding_token_by_token(name, changes):
    model, tokens_BN, policy = make_model(**changes), make_tokens(length=LENGTH), POLICIES[name]
    targets_BN = np.roll(tokens_BN, -1, axis=1)
    losses = {}
    with jax.default_matmul_precision("highest"):
        for dtype in ("float32", "int8"):
            evaluator = Evaluator(model, Windows(tokens_BN, targets_BN), policy, cache_dtype=dtype)
            losses[dtype] = evaluator.losses([BUDGETS])[0].windows
        cache = init_pruned_cache(model.config, 3, BUDGETS, policy, "int8")
        logits_BNV, _ = decode_all(model, cache, tokens_BN)
    log_BNV = np.asarray(jax.nn.log_softmax(logits_BNV))
    expected_BN = -np.take_along_axis(log_BNV, targets_BN[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses["int8"], expected_BN.mean(axis=1), atol=1e-4)
    assert np.abs(losses["int8"] - losses["float32"]).max() > 1e-3


@pytest.mark.parametrize("attention", ["xla", pytest.param("pallas", marks=pytest.mark.slow)])
def test_prompts_in_blocks_leave_the_slots_that_steps_leave(attention):
    """To the bit in the lowest layer, whose input is the same: what was rounded once is not rounded again."""
    model, tokens_BN, policy = make_model(attention=attention), make_tokens(), POLICIES["selective"]
    prompts = [row[:length].tolist() for row, length in zip(tokens_BN, LENGTHS, strict=True)]
    with jax.default_matmul_precision("highest"):
        logits_BV, cache = Decoder(model, BUDGETS, policy, cache_dtype="int8", block=4).prefill(prompts)
        for row, length in enumerate(LENGTHS):
            one = init_pruned_cache(model.config, 1, BUDGETS, policy, "int8")
            logits_1NV, stepped = decode_all(model, one, tokens_BN[row : row + 1, :length])
            np.testing.assert_allclose(logits_BV[row], logits_1NV[0, -1], atol=5e-3)
            for found, expected in zip(held(cache.layers[0], row), held(stepped.layers[0], 0), strict=True):
                assert expected.keys() == found.keys() and len(found) == min(3, length)
                for position, numbers in expected.items():
                    np.testing.assert_array_equal(found[position], numbers)


def held(layer, row):
    """Keys, values and scales of a row's tokens, by their positions."""
    positions = np.asarray(layer.position[row, 0])
    tokens = [(slot, int(position)) for slot, position in enumerate(positions) if position >= 0]
    heads = [slots_as_heads(x, layer.budget, 8, 4, fused=layer.fused)[row] for x in (layer.k, layer.v)]
    arrays = [
        np.asarray(x, np.float32)
        for x in (*heads, *(x[row] for x in slots_as_scales(layer.scale, 4, fused=layer.fused)))
    ]
    return [{position: array[slot] for slot, position in tokens} for array in arrays]


def test_a_full_cache_after_a_prompt_is_that_of_steps():
    model, tokens_BN = make_model(), make_tokens()
    _, cache = jax.jit(lambda tokens: full_prefill(model, tokens, length=LENGTH, dtype="int8"))(tokens_BN[:, :11])
    _, stepped = decode_all(model, init_cache(model.config, 3, LENGTH, "int8"), tokens_BN[:, :11])
    first, expected = cache.layers[0], stepped.layers[0]
    for name in ("k", "v", "scale"):
        np.testing.assert_array_equal(getattr(first, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(first.f, expected.f, atol=1e-4)


@pytest.mark.slow
def test_an_engine_draws_what_a_decoder_does_from_about_half_of_bfloat16s_bytes():
    model, prompts = make_model(tied_embeddings=False, head_dim=32), make_tokens(batch=3)[:, :9].tolist()
    arguments = model, BUDGETS, POLICIES["selective"]
    decoder = Decoder(*arguments, cache_dtype="int8")
    expected = decoder.generate(prompts, 6, temperature=0)
    engine = Engine(*arguments, rows=2, steps=3, block=4, cache_dtype="int8")
    numbers = {engine.submit(GenerationRequest(prompt, 6, temperature=0)): n for n, prompt in enumerate(prompts)}
    assert {numbers[done.number]: done.tokens for done in engine} == dict(enumerate(expected))
    sizes = [cache_bytes(init_pruned_cache(model.config, 4, BUDGETS, POLICIES["selective"], dtype)) for dtype in
             ("int8", "bfloat16")]  # fmt: skip
    assert cache_bytes(decoder.prefill(prompts)[1]) == sizes[0] < 0.55 * sizes[1]


@pytest.mark.parametrize("dtype", ["int4", "int32", "half of it", "uint8"])
def test_another_dtype_is_refused_by_its_name(dtype):
    with pytest.raises(
        ValueError, match=f"cannot hold keys and values in '{dtype}'; choose one of float32, bfloat16, "
    ):
        Decoder(make_model(num_layers=1), Budgets((3,), LENGTH), POLICIES["selective"], cache_dtype=dtype)
