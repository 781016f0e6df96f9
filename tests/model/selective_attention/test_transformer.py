"""The transformer and its config, against a float64 transformer in numpy that shares no code with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention import Selection, Transformer, TransformerConfig, lm_loss
from tests.support.attention_oracle import RULES, literal_mask, streaming

SIZES = {
    "vocab_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "d_model": 24,
    "mlp_dim": 20,
    "max_length": 12,
    "head_dim": 6,
}
VARIANTS = {
    **{selection.value: {"selection": selection} for selection in Selection},
    "one_kv_head": {"num_kv_heads": 1},
    "learned": {"positions": "learned"},
    "untied": {"tied_embeddings": False},
    "no_qk_norm": {"qk_norm": False},
    "all_at_once": {
        "num_kv_heads": 2,
        "selection": "own_head",
        "positions": "learned",
        "tied_embeddings": False,
        "attention": "xla",
    },
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def make_config(**changes):
    return TransformerConfig(**{**SIZES, "dtype": "float32", "attention": "reference", **changes})


def make_model(seed=0, **changes):
    """A model whose norm scales are not all one, so that a forgotten one would show, and that selects strongly."""
    model = Transformer(make_config(**changes), rngs=nnx.Rngs(params=seed))
    rng = np.random.default_rng(seed)
    for name, parameter in parameters(model).items():
        if name.endswith("_norm"):
            typical = 2.0 if name.startswith(("blocks/query", "blocks/key")) else 1.0
            parameter[...] = jnp.asarray(typical * rng.uniform(0.5, 1.5, parameter.shape), jnp.float32)
    return model


def parameters(model):
    """Parameters by name, such as "blocks/w_key"."""
    return {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def make_tokens(batch=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, length), dtype=np.int32)


@nnx.jit
def forward(model, tokens_BN, segment_ids=None):
    return model(tokens_BN, segment_ids=segment_ids)


def oracle_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def oracle_rotary(x_BNHD, base):
    """Each pair (d, d + D / 2) as a complex number, turned by position times its frequency."""
    half = x_BNHD.shape[-1] // 2
    position_N = np.arange(x_BNHD.shape[1])
    turn_ND = np.exp(1j * position_N[:, None] * base ** (-np.arange(half) / half))
    turned = (x_BNHD[..., :half] + 1j * x_BNHD[..., half:]) * turn_ND[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def oracle_logits(model, tokens_BN, rule):
    """Logits [B, N, V] in float64, and F of each layer [L, B, N, N]."""
    c = model.config
    p = {name: np.asarray(value[...], np.float64) for name, value in parameters(model).items()}
    x = p["embedding"][tokens_BN]
    if c.positions == "learned":
        x = x + p["position_embedding"][: tokens_BN.shape[1]]
    masks = []
    for layer in range(c.num_layers):
        w = {name.removeprefix("blocks/"): value[layer] for name, value in p.items() if name.startswith("blocks/")}
        h = oracle_norm(x, w["attention_norm"])
        q, k, v = (np.tensordot(h, w[f"w_{name}"], 1) for name in ("query", "key", "value"))
        q_sel = k_sel = None
        if c.selection is Selection.OWN_HEAD:
            q_sel, k_sel = (np.tensordot(h, w[f"w_{name}_sel"], 1)[:, :, None] for name in ("query", "key"))
        if c.qk_norm:
            q, k = oracle_norm(q, w["query_norm"]), oracle_norm(k, w["key_norm"])
            if q_sel is not None:
                q_sel, k_sel = oracle_norm(q_sel, w["query_sel_norm"]), oracle_norm(k_sel, w["key_sel_norm"])
        if c.positions == "rotary":
            q, k = oracle_rotary(q, c.rotary_base), oracle_rotary(k, c.rotary_base)
            if q_sel is not None:
                q_sel, k_sel = oracle_rotary(q_sel, c.rotary_base), oracle_rotary(k_sel, c.rotary_base)
        q_sel, k_sel = (q, k) if q_sel is None else (q_sel, k_sel)
        q_sel, k_sel = q_sel[:, :, 0], k_sel[:, :, 0]
        masks.append(literal_mask(q_sel, k_sel, c.head_dim**-0.5, rule=rule))
        out, _ = streaming(q, k, v, q_sel=q_sel, k_sel=k_sel, rule=rule)
        x = x + np.einsum("bnhd,hde->bne", out, w["w_out"])
        h = oracle_norm(x, w["mlp_norm"])
        gate = h @ w["w_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w_up"])) @ w["w_down"]
    return oracle_norm(x, p["final_norm"]) @ p["embedding" if c.tied_embeddings else "output"].T, np.stack(masks)


class TestForward:
    @each_variant
    def test_equals_the_float64_transformer(self, changes):
        model, tokens_BN = make_model(**changes), make_tokens()
        expected_BNV, _ = oracle_logits(model, tokens_BN, RULES[model.config.selection.value])
        logits_BNV = forward(model, tokens_BN)
        assert logits_BNV.dtype == jnp.float32
        np.testing.assert_allclose(logits_BNV, expected_BNV, atol=2e-5 * np.abs(expected_BNV).max())

    def test_with_f_removed_it_is_the_standard_transformer(self):
        """Same parameters and names; only F differs, and it does make a difference."""
        selective, tokens_BN = make_model(), make_tokens()
        standard = Transformer(make_config(selection="off"), rngs=nnx.Rngs(params=1))
        nnx.update(standard, nnx.state(selective, nnx.Param))
        expected_BNV, _ = oracle_logits(selective, tokens_BN, RULES["off"])
        np.testing.assert_allclose(forward(standard, tokens_BN), expected_BNV, atol=2e-5 * np.abs(expected_BNV).max())
        assert np.abs(forward(selective, tokens_BN) - expected_BNV).max() > 0.1

    def test_selection_masks_are_the_masks_that_the_layers_use(self):
        model, tokens_BN = make_model(), make_tokens()
        _, expected_LBNN = oracle_logits(model, tokens_BN, RULES["paper"])
        assert expected_LBNN.max() > 1
        masks_LBNN = jax.jit(Transformer.selection_masks)(model, tokens_BN)
        np.testing.assert_allclose(masks_LBNN, expected_LBNN, atol=2e-5 * expected_LBNN.max())

    def test_hidden_gives_the_memory_statistic_of_each_layer(self):
        model, tokens_BN = make_model(), make_tokens()
        hidden_BNE, forgotten_LBN = model.hidden(tokens_BN, memory_tau=0.7)
        _, masks_LBNN = oracle_logits(model, tokens_BN, RULES["paper"])
        np.testing.assert_allclose(forgotten_LBN, (np.minimum(masks_LBNN, 0.7) / 0.7).sum(-1), atol=1e-4)
        np.testing.assert_allclose(model.logits(hidden_BNE), forward(model, tokens_BN), atol=1e-5)

    @pytest.mark.parametrize("selection", ["paper", "leaky", "own_head"])
    @pytest.mark.parametrize("place", [1, 6, 11])
    def test_a_token_changes_nothing_before_it_and_something_after(self, selection, place):
        model, tokens_BN = make_model(selection=selection), make_tokens()
        changed_BN = tokens_BN.copy()
        changed_BN[:, place] = (changed_BN[:, place] + 1) % SIZES["vocab_size"]
        before, after = np.asarray(forward(model, tokens_BN)), np.asarray(forward(model, changed_BN))
        np.testing.assert_array_equal(before[:, :place], after[:, :place])
        assert (np.abs(before - after).max(-1)[:, place:] > 1e-5).all()

    def test_packed_documents_do_not_see_each_other(self):
        model, tokens_BN = make_model(), make_tokens()
        segment_ids = np.repeat([[0, 1]], 2, axis=0).repeat([5, 7], axis=1).astype(np.int32)
        together = forward(model, tokens_BN, segment_ids)
        np.testing.assert_allclose(together[:, :5], forward(model, tokens_BN[:, :5]), atol=1e-5)
        # Rotary positions are relative, so that the second document may start anywhere.
        np.testing.assert_allclose(together[:, 5:], forward(model, tokens_BN[:, 5:]), atol=1e-4)

    def test_rows_of_padding_give_finite_gradients_and_leave_the_others_alone(self):
        model, tokens_BN = make_model(), make_tokens()
        segment_ids = np.zeros((2, 12), np.int32)
        segment_ids[1] = -1
        weights_BN = (segment_ids >= 0).astype(np.float32)

        @nnx.jit
        def gradient(model, tokens_BN, segment_ids, weights_BN):
            loss = lambda m: lm_loss(m(tokens_BN, segment_ids=segment_ids), tokens_BN, weights_BN)[0]  # noqa: E731
            return nnx.grad(loss)(model)

        padded = jax.tree.leaves(gradient(model, tokens_BN, segment_ids, weights_BN))
        alone = jax.tree.leaves(gradient(model, tokens_BN[:1], segment_ids[:1], weights_BN[:1]))
        assert np.isfinite(forward(model, tokens_BN, segment_ids)).all()
        for one, other in zip(padded, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))

    def test_bfloat16_activations_keep_float32_parameters_and_logits(self):
        model = make_model(dtype="bfloat16")
        exact = make_model(dtype="float32")
        logits_BNV = forward(model, make_tokens())
        assert logits_BNV.dtype == jnp.float32
        assert {p.dtype for p in parameters(model).values()} == {jnp.dtype("float32")}
        assert 0 < np.abs(logits_BNV - forward(exact, make_tokens())).max() < 0.2


APART = {"scan_layers": False}


@pytest.mark.parametrize("changes", [{"remat": "dots"}, {"remat": "block"}, APART, APART | {"remat": "block"}], ids=str)
def test_how_layers_are_compiled_changes_no_gradient(changes):
    @nnx.jit
    def gradient(model, tokens_BN):
        return nnx.grad(lambda m: lm_loss(m(tokens_BN), tokens_BN, jnp.ones(tokens_BN.shape))[0])(model)

    kept = jax.tree.leaves(gradient(make_model(), make_tokens()))
    others = jax.tree.leaves(gradient(make_model(**changes), make_tokens()))
    for one, other in zip(kept, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


class TestParameterCounts:
    @each_variant
    def test_equal_the_arrays(self, changes):
        config = make_config(**changes)
        shapes = parameters(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))
        part_of = {
            "embedding": "embedding",
            "position_embedding": "embedding",
            "output": "output",
            "blocks/w_gate": "mlp",
            "blocks/w_up": "mlp",
            "blocks/w_down": "mlp",
        }
        actual = dict.fromkeys(["embedding", "attention", "mlp", "norms", "output"], 0)
        for name, parameter in shapes.items():
            part = "norms" if name.endswith("_norm") else part_of.get(name, "attention")
            actual[part] += int(np.prod(parameter.shape))
        assert config.parameter_counts() == actual | {"total": sum(actual.values())}

    @pytest.mark.parametrize(("d", "millions"), [(8, 25), (12, 85), (16, 201), (20, 393), (24, 680), (28, 1080)])
    def test_the_ladder_has_the_papers_core_sizes(self, d, millions):
        counts = TransformerConfig.from_width(d, vocab_size=8192, max_length=512).parameter_counts()
        # The paper counts 12 d_model^2 a layer; a SwiGLU width that is a multiple of 128 differs by up to 2.1%.
        assert (counts["attention"] + counts["mlp"]) / 1e6 == pytest.approx(millions, rel=0.03)


class TestConfig:
    def test_the_ladder_is_one_size_parameter(self):
        config = TransformerConfig.from_width(12, vocab_size=8192, max_length=512)
        sizes = (config.num_layers, config.num_heads, config.num_kv_heads, config.d_model, config.head_dim)
        assert sizes == (12, 12, 12, 768, 64)
        assert config.mlp_dim == 2048
        for d in (8, 16, 20, 24, 28):
            mlp_dim = TransformerConfig.from_width(d, vocab_size=1, max_length=1).mlp_dim
            assert mlp_dim % 128 == 0
            assert 0 <= mlp_dim - 8 * 64 * d / 3 < 128

    def test_overrides_win_over_the_ladder(self):
        config = TransformerConfig.from_width(4, vocab_size=8, max_length=8, num_layers=1, num_kv_heads=2)
        assert (config.num_layers, config.num_heads, config.num_kv_heads, config.d_model) == (1, 4, 2, 256)

    def test_selection_is_read_from_its_name(self):
        assert make_config(selection="off") == make_config(selection=Selection.OFF)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"vocab_sise": 3}, TypeError, "vocab_sise"),
            ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
            ({"num_layers": -1}, ValueError, "num_layers must be at least 1, got -1"),
            ({"num_kv_heads": 3}, ValueError, "num_kv_heads=3 must divide num_heads=4"),
            ({"selection": "papers"}, ValueError, "'papers' is not a valid Selection"),
            ({"positions": "alibi"}, ValueError, "positions must be one of rotary, learned; got 'alibi'"),
            ({"dtype": "float16"}, ValueError, "dtype must be one of bfloat16, float32, float64; got 'float16'"),
            ({"remat": "all"}, ValueError, "remat must be one of none, dots, block; got 'all'"),
            ({"head_dim": 5}, ValueError, "rotary positions need an even head_dim, got 5"),
        ],
    )
    def test_what_it_refuses(self, changes, error, message):
        with pytest.raises(error, match=message):
            make_config(**changes)

    def test_it_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            make_config().vocab_size = 3

    def test_an_unknown_implementation_is_named_when_attention_runs(self):
        with pytest.raises(ValueError, match="'flash' is unknown"):
            make_model(attention="flash")(make_tokens())
