"""Decoding through a cache computes what the parallel pass over the whole sequence computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention import Selection, Transformer, TransformerConfig
from selective_attention.transformer.decoding import (
    Cache,
    FullLayerCache,
    decode_step,
    for_decoding,
    init_cache,
    prefill,
)
from selective_attention.transformer.sampling import sample

VOCAB, LENGTH, BATCH = 50, 16, 3
LENGTHS = np.array([3, 9, 1], np.int32)  # of ragged prompts
ROWS = np.arange(BATCH)


def make_model(**changes):
    """A small model that selects strongly, so that a wrong F changes the logits by far more than 1e-4."""
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 4, "d_model": 32, "mlp_dim": 48, "head_dim": 8}
    choices = {"max_length": LENGTH, "dtype": "float32", "attention": "reference"}  # which compiles fastest
    model = Transformer(TransformerConfig(**{**sizes, **choices, **changes}), rngs=nnx.Rngs(params=0))
    if model.config.qk_norm:
        model.blocks.query_norm[...] *= 3
    return model


def make_tokens(seed=0, batch=BATCH, length=LENGTH):
    tokens_BN = np.random.default_rng(seed).integers(3, VOCAB, (batch, length), dtype=np.int32)
    tokens_BN[:, 0] = 2
    return tokens_BN


# Compiling is most of the time here, and the programs are too small to be worth optimising.
UNOPTIMISED = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="options", compiler_options=UNOPTIMISED)
def _jitted(function, graph, parameters, *arguments, options):
    return function(nnx.merge(graph, parameters), *arguments, **dict(options))


def jitted(function, model, *arguments, **options):
    """`function(model, *arguments, **options)` under jit, compiled once for equal models and options."""
    return _jitted(function, *nnx.split(model), *arguments, options=tuple(options.items()))


def forward(model, tokens_BN):
    return np.asarray(jitted(Transformer.__call__, model, tokens_BN))


def decode_all(model, cache, tokens_BN):
    """Logits [B, N, V] of feeding the tokens one by one, and the cache after them."""
    logits = []
    for tokens_B in tokens_BN.T:
        logits_BV, cache = jitted(decode_step, model, cache, tokens_B)
        logits.append(logits_BV)
    return np.stack(logits, axis=1), cache


VARIANTS = {
    **{selection.value: {"selection": selection} for selection in Selection},
    "grouped": {"num_kv_heads": 2},
    "one_kv_head_own_selection": {"num_kv_heads": 1, "selection": "own_head"},
    "learned_positions": {"positions": "learned"},
    "untied_without_qk_norm": {"tied_embeddings": False, "qk_norm": False},
    "blockwise_prefill": {"attention": "xla"},
}
KERNELS = {"attention": "pallas", "head_dim": 32, "num_kv_heads": 2}


@pytest.mark.parametrize(
    "changes",
    [*VARIANTS.values(), pytest.param(KERNELS, marks=pytest.mark.slow)],
    ids=[*VARIANTS.keys(), "kernels"],
)
def test_decoding_equals_the_parallel_pass_from_nothing_and_from_ragged_prompts(changes):
    model, tokens_BN = make_model(**changes), make_tokens()
    expected_BNV = forward(model, tokens_BN)

    logits_BNV, cache = decode_all(model, init_cache(model.config, BATCH, LENGTH), tokens_BN)
    np.testing.assert_allclose(logits_BNV, expected_BNV, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(cache.position, LENGTH)

    logits_BV, cache = jitted(prefill, model, tokens_BN[:, : LENGTHS.max()], LENGTHS, length=LENGTH)
    np.testing.assert_allclose(logits_BV, expected_BNV[ROWS, LENGTHS - 1], atol=1e-4, rtol=0)
    places_BS = LENGTHS[:, None] + np.arange(LENGTH - LENGTHS.max())
    logits_BSV, _ = decode_all(model, cache, tokens_BN[ROWS[:, None], places_BS])
    np.testing.assert_allclose(logits_BSV, expected_BNV[ROWS[:, None], places_BS], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["paper", "own_head", "grouped"])
def test_prefill_leaves_the_cache_that_steps_leave(variant):
    model, tokens_BN = make_model(**VARIANTS[variant]), make_tokens()[:, :11]
    _, expected = decode_all(model, init_cache(model.config, BATCH, LENGTH), tokens_BN)
    _, cache = jitted(prefill, model, tokens_BN, length=LENGTH)
    assert jax.tree.structure(cache) == jax.tree.structure(expected)
    for actual, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-5, rtol=0)


def test_the_carried_f_is_the_next_row_of_the_mask():
    model, tokens_BN = make_model(), make_tokens()
    masks_LBNN = np.asarray(jitted(Transformer.selection_masks, model, tokens_BN))
    assert masks_LBNN[:, :, -1].max() > 1, "the model must select for this test to mean anything"
    _, cache = jitted(prefill, model, tokens_BN[:, :-1], length=LENGTH)
    for layer, masks_BNN in zip(cache.layers, masks_LBNN, strict=True):
        np.testing.assert_allclose(layer.f, masks_BNN[:, -1], atol=1e-4, rtol=1e-5)


def test_without_the_carried_f_the_logits_differ():
    model, tokens_BN = make_model(), make_tokens()
    _, cache = jitted(prefill, model, tokens_BN[:, :-1], length=LENGTH)
    layers = [FullLayerCache(x.k, x.v, x.k_sel, jnp.zeros_like(x.f), x.selection) for x in cache.layers]
    without_f = Cache(cache.position, tuple(layers))
    right, wrong = (jitted(decode_step, model, c, tokens_BN[:, -1])[0] for c in (cache, without_f))
    assert np.abs(right - wrong).max() > 1e-2


def test_what_pads_a_prompt_does_not_matter():
    model, tokens_BN = make_model(), make_tokens()
    results = []
    for padding in (7, 8):
        padded_BN = np.where(np.arange(LENGTH) < LENGTHS[:, None], tokens_BN, padding)
        logits_BV, cache = jitted(prefill, model, padded_BN, LENGTHS, length=LENGTH)
        results.append((logits_BV, jitted(decode_step, model, cache, np.array([4, 5, 6]))[0]))
    np.testing.assert_array_equal(results[0], results[1])


def test_a_bfloat16_cache_keeps_f_in_float32():
    model, tokens_BN = make_model(), make_tokens()
    logits_BNV, cache = decode_all(model, init_cache(model.config, BATCH, LENGTH, "bfloat16"), tokens_BN)
    assert {x.dtype for layer in cache.layers for x in (layer.k, layer.v)} == {jnp.dtype("bfloat16")}
    assert {layer.f.dtype for layer in cache.layers} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits_BNV, forward(model, tokens_BN), atol=0.1, rtol=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoMemory:
    """A layer cache of one slot: a query sees nothing but its own token, so attention gives back that token's value."""

    def attend(self, position_B, q, k, v, q_sel, k_sel):
        return v, self


def test_layers_may_have_caches_of_other_kinds_and_sizes():
    model, tokens_BN = make_model(), make_tokens()
    full = init_cache(model.config, BATCH, LENGTH)
    logits_BNV, _ = decode_all(model, Cache(full.position, (full.layers[0], NoMemory())), tokens_BN)
    never, at_once = np.full(LENGTH, LENGTH), np.arange(1, LENGTH + 1)
    evict_at = np.broadcast_to(np.stack([never, at_once])[:, None], (2, BATCH, LENGTH)).astype(np.int32)
    np.testing.assert_allclose(logits_BNV, model(tokens_BN, evict_at=evict_at), atol=1e-4, rtol=0)


class TestSample:
    def test_greedy_takes_the_likeliest_token_at_each_step(self):
        model, prompt_BN = make_model(), make_tokens()[:, :5]
        drawn_BT = sample(model, prompt_BN, LENGTH - 5, key=jax.random.key(0), temperature=0)
        assert drawn_BT.dtype == jnp.int32
        whole_BN = np.concatenate([prompt_BN, drawn_BT], axis=1)
        np.testing.assert_array_equal(drawn_BT, np.argmax(forward(model, whole_BN)[:, 4:-1], axis=-1))

    def test_ragged_rows_are_those_of_single_prompts(self):
        model, tokens_BN = make_model(), make_tokens()[:, : LENGTHS.max()]
        together = sample(model, tokens_BN, 4, key=jax.random.key(0), temperature=0, lengths_B=jnp.asarray(LENGTHS))
        alone = sample(model, tokens_BN[:1, : LENGTHS[0]], 4, key=jax.random.key(0), temperature=0)
        np.testing.assert_array_equal(together[0], alone[0])

    def test_a_key_decides_what_is_drawn(self):
        model, prompt_BN = make_model(), make_tokens()[:, :5]
        first, again, other = (sample(model, prompt_BN, 10, key=jax.random.key(seed)) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_drawn_tokens_follow_the_softmax_at_the_temperature(self):
        # Tied and untrained, a model would nearly always repeat its last token.
        model, prompt_1N = make_model(tied_embeddings=False), make_tokens(batch=1)[:, :5]
        temperature, draws = 0.5, 4_000
        prompts_BN = np.repeat(prompt_1N, draws, axis=0)
        drawn_B1 = np.asarray(sample(model, prompts_BN, 1, key=jax.random.key(0), temperature=temperature))
        observed_V = np.bincount(drawn_B1[:, 0], minlength=VOCAB) / draws
        logits_V = forward(model, prompt_1N)[0, -1].astype(np.float64)

        def total_variation(temperature):
            weights_V = np.exp((logits_V - logits_V.max()) / temperature)
            return np.abs(observed_V - weights_V / weights_V.sum()).sum() / 2

        # Chance alone gives at most sqrt(V / draws) / 2 = 0.056 on average.
        assert total_variation(temperature) < 0.07
        assert total_variation(2 * temperature) > 0.14

    def test_top_k_draws_only_the_likeliest(self):
        model, prompt_1N = make_model(), make_tokens(batch=1)[:, :5]
        prompts_BN = np.repeat(prompt_1N, 500, axis=0)
        drawn_B1 = sample(model, prompts_BN, 1, key=jax.random.key(0), temperature=5.0, top_k=3)
        likeliest = np.argsort(forward(model, prompt_1N)[0, -1])[-3:]
        assert set(np.unique(drawn_B1)) == set(likeliest)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_tokens": 12}, r"num_tokens must be from 1 to 11, what max_length=16 leaves.*got 12"),
            ({"num_tokens": 0}, "got 0"),
            ({"num_tokens": 1, "temperature": -1.0}, "temperature must not be negative, got -1.0"),
            ({"num_tokens": 1, "top_k": 51}, "top_k must be from 1 to vocab_size=50, got 51"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            sample(make_model(), make_tokens()[:, :5], key=jax.random.key(0), **arguments)


def test_prompts_longer_than_the_cache_are_refused():
    with pytest.raises(ValueError, match="prompts of 16 tokens do not fit into a cache of length 15"):
        prefill(make_model(), make_tokens(), length=15)


@pytest.mark.parametrize(
    "changes",
    [{"selection": Selection.OWN_HEAD, "tied_embeddings": False}, {"positions": "learned", "qk_norm": False}],
    ids=["own_head", "learned"],
)
def test_a_model_for_decoding_computes_the_same_bits_from_half_the_bytes(changes):
    model = make_model(dtype="bfloat16", **changes)
    random = np.random.default_rng(0)
    model.blocks.mlp_norm[...] *= random.uniform(0.5, 2, model.blocks.mlp_norm.shape).astype(np.float32)
    tokens_BN = make_tokens()
    logits = []
    for each in (model, for_decoding(model)):
        logits_BV, cache = jitted(prefill, each, tokens_BN[:, :7], length=LENGTH)
        logits.append([logits_BV, jitted(decode_step, each, cache, tokens_BN[:, 7])[0]])
    np.testing.assert_array_equal(*logits)
    prepared = for_decoding(model)
    before, after = (sum(x.nbytes for x in jax.tree.leaves(nnx.split(each)[1])) for each in (model, prepared))
    assert after < (0.7 if "positions" in changes else 0.52) * before  # norms, and embeddings with learned positions
    assert model.blocks.w_gate.dtype == np.float32 and np.ptp(model.blocks.mlp_norm[...])  # as it was
