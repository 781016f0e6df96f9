"""The encoder-decoder: who sees what, and that every mesh computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention import Selection, TransformerConfig, fill, init_cache, lm_loss
from selective_attention.transformer.encoder_decoder import EncoderDecoder, Filler, full_attention

AXES = ("data", "fsdp", "context", "tensor")


def make(selection=Selection.PAPER, **changes):
    sizes = {"num_layers": 2, "num_heads": 2, "d_model": 32, "head_dim": 16, "mlp_dim": 64, "vocab_size": 64}
    config = TransformerConfig(**sizes | {"max_length": 16, "dtype": "float32", "selection": selection} | changes)
    return EncoderDecoder(config, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return rng.integers(0, 64, (4, 16), dtype=np.int32), rng.integers(0, 64, (4, 8), dtype=np.int32)


def test_full_attention_is_softmax_over_the_visible_keys():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)))
    visible = rng.random((2, 7)) > 0.4
    expected = np.zeros_like(q, np.float64)
    for b, n, h in np.ndindex(2, 5, 4):
        logits = k[b, visible[b], h // 2].astype(np.float64) @ q[b, n, h] * 8**-0.5
        weights = np.exp(logits - logits.max())
        expected[b, n, h] = weights @ v[b, visible[b], h // 2] / weights.sum()
    np.testing.assert_allclose(full_attention(q, k, v, visible), expected, atol=1e-6)


def test_every_output_sees_the_whole_input_and_only_earlier_outputs(tokens):
    inputs, outputs = tokens
    model = make()
    logits = model(inputs, outputs)
    other_input = inputs.copy()
    other_input[:, -1] = (inputs[:, -1] + 1) % 64
    assert (np.abs(model(other_input, outputs) - logits).max(-1) > 1e-6).all()
    other_output = outputs.copy()
    other_output[:, 5] = (outputs[:, 5] + 1) % 64
    changed = np.abs(model(inputs, other_output) - logits).max(-1)
    np.testing.assert_array_equal(changed[:, :5], 0)
    assert (changed[:, 5:] > 0).all()


def test_padding_of_the_input_changes_nothing(tokens):
    inputs, outputs = tokens
    model = make()
    visible = np.arange(16)[None] < np.array([16, 9, 12, 1])[:, None]
    logits = model(inputs, outputs, visible_BM=visible)
    np.testing.assert_allclose(model(np.where(visible, inputs, 7), outputs, visible_BM=visible), logits, atol=1e-6)
    alone = model(inputs[1:2, :9], outputs[1:2])
    np.testing.assert_allclose(logits[1:2], alone, atol=1e-5)


def test_selection_acts_in_the_decoder(tokens):
    inputs, outputs = tokens
    ours, standard = make(), make(Selection.OFF)
    nnx.update(standard, nnx.state(ours, nnx.Param))
    difference = np.abs(ours(inputs, outputs) - standard(inputs, outputs)).max((0, 2))
    np.testing.assert_allclose(difference[:3], 0, atol=1e-6)  # F is zero for the first three queries
    assert difference[3:].min() > 1e-4
    forgotten = ours.hidden(inputs, outputs, memory_tau=1.0)[1]
    assert forgotten.shape == (2, 4, 8) and float(forgotten.max()) > 0


def test_masks_are_those_that_the_memory_statistic_sums(tokens):
    inputs, outputs = tokens
    visible, model = np.arange(16)[None] < np.array([16, 9, 12, 1])[:, None], make()
    f_LBNN = np.asarray(model.selection_masks(inputs, outputs, visible_BM=visible))
    forgotten_LBN = model.hidden(inputs, outputs, visible_BM=visible, memory_tau=1.0)[1]
    np.testing.assert_allclose(np.minimum(f_LBNN, 1).sum(axis=-1), forgotten_LBN, atol=1e-5)


@pytest.mark.parametrize("selection", [Selection.PAPER, pytest.param(Selection.OWN_HEAD, marks=pytest.mark.slow)])
def test_decoding_is_the_parallel_pass(tokens, selection):
    inputs, outputs = tokens
    visible, model = np.arange(16)[None] < np.array([16, 9, 12, 1])[:, None], make(selection, num_kv_heads=1)
    expected = model(inputs, outputs, visible_BM=visible)
    filler, cache = Filler(model, inputs, visible), init_cache(model.config, 4, 8)
    for n in range(8):
        logits, cache = filler.step(cache, outputs[:, n])
        np.testing.assert_allclose(logits, expected[:, n], atol=1e-5)


def test_filling_takes_the_likeliest_token_after_those_before(tokens):
    inputs, _ = tokens
    visible, model = np.arange(16)[None] < np.array([16, 9, 12, 1])[:, None], make()
    written = np.asarray(fill(model, inputs, 6, bos_id=1, key=jax.random.key(0), visible_BM=visible))
    outputs = np.concatenate([np.ones((4, 1), np.int32), written[:, :-1]], axis=1)
    np.testing.assert_array_equal(written, np.argmax(model(inputs, outputs, visible_BM=visible), axis=-1))
    drawn = fill(model, inputs, 6, bos_id=1, key=jax.random.key(0), visible_BM=visible, temperature=3.0)
    assert np.any(drawn != written)


def test_parameters_are_counted_by_part():
    for changes in ({}, {"selection": Selection.OWN_HEAD, "num_kv_heads": 1}, {"qk_norm": False, "selection": "off"}):
        model = make(**changes)
        total = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        counts = EncoderDecoder.parameter_counts(model.config)
        assert counts["total"] == total == sum(n for part, n in counts.items() if part != "total")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 2, 2, 2)])
def test_mesh_gives_the_gradients_of_one_device(tokens, shape):
    inputs, outputs = tokens

    def gradient(params, graph, inputs, outputs):
        logits = nnx.merge(graph, params)(inputs, outputs)
        return lm_loss(logits, outputs, jnp.ones(outputs.shape, jnp.float32))[0]

    graph, params = nnx.split(make())
    expected = jax.jit(jax.grad(gradient), static_argnums=1)(params, graph, inputs, outputs)
    with jax.set_mesh(jax.make_mesh(shape, AXES)):
        sharded = jax.jit(lambda: nnx.state(make(), nnx.Param))()
        rows = jax.P(("data", "fsdp"), "context")
        on_mesh = jax.jit(jax.grad(gradient), static_argnums=1)(
            sharded, graph, jax.device_put(inputs, rows), jax.device_put(outputs, rows)
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(on_mesh), strict=True):
        error = np.linalg.norm(np.asarray(y) - x) / np.linalg.norm(x)
        assert error < 5e-5, f"{jax.tree_util.keystr(path)}: {error:.1e}"
