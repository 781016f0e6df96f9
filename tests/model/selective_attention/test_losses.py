"""Both losses against float64 loops over their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selective_attention import lm_loss, memory_loss, memory_per_query, selective_attention
from tests.support.attention_oracle import RULES, literal_mask


def random_batch(seed=0, batch=3, length=6, vocab=11, scale=3.0):
    rng = np.random.default_rng(seed)
    logits_BNV = rng.normal(0, scale, (batch, length, vocab)).astype(np.float32)
    targets_BN = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    weights_BN = (rng.random((batch, length)) < 0.7).astype(np.float32)
    return logits_BNV, targets_BN, weights_BN


class TestLmLoss:
    @pytest.mark.parametrize("scale", [1.0, 3.0, 1e4])
    def test_equals_the_float64_definition(self, scale):
        logits_BNV, targets_BN, weights_BN = random_batch(scale=scale)
        expected = 0.0
        for logits_V, target, weight in zip(
            logits_BNV.reshape(-1, 11).astype(np.float64), targets_BN.flat, weights_BN.flat, strict=True
        ):
            top = logits_V.max()
            expected += weight * (top + np.log(np.exp(logits_V - top).sum()) - logits_V[target])
        nll, count = lm_loss(logits_BNV, targets_BN, weights_BN)
        np.testing.assert_allclose(nll, expected, rtol=1e-6)
        assert count == weights_BN.sum()

    def test_gradient_is_softmax_minus_the_target_where_it_counts(self):
        logits_BNV, targets_BN, weights_BN = random_batch()
        gradient_BNV = jax.grad(lambda logits: lm_loss(logits, targets_BN, weights_BN)[0])(logits_BNV)
        exp_BNV = np.exp(logits_BNV.astype(np.float64))
        expected_BNV = exp_BNV / exp_BNV.sum(-1, keepdims=True) - np.eye(11)[targets_BN]
        np.testing.assert_allclose(gradient_BNV, expected_BNV * weights_BN[..., None], atol=1e-6)

    def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(self):
        nll, count = lm_loss(np.zeros((2, 3, 11), np.float32), np.ones((2, 3), np.int32), np.ones((2, 3), np.float32))
        np.testing.assert_allclose(nll / count, np.log(11), rtol=1e-6)

    def test_nothing_that_counts_is_zero_with_zero_gradient(self):
        logits_BNV, targets_BN, weights_BN = random_batch()
        value, gradient = jax.value_and_grad(lambda x: lm_loss(x, targets_BN, 0 * weights_BN)[0])(logits_BNV)
        assert value == 0
        assert not np.any(gradient)


def oracle_memory_loss(masks_LBNN, weights_BN, tau):
    """Section 3, one scalar at a time, from F itself."""
    layers, batch, length, _ = masks_LBNN.shape
    losses = []
    for b in range(batch):
        total = 0.0
        for layer in range(layers):
            remembered = [0.0]
            for i in range(1, length + 1):
                if weights_BN[b, i - 1] > 0:
                    forgotten = sum(min(masks_LBNN[layer, b, i - 1, k - 1], tau) for k in range(1, i + 1)) / tau
                    remembered.append(i - forgotten)
            total += max(remembered)
        losses.append(total / (layers * max(1, int((weights_BN[b] > 0).sum()))))
    return np.array(losses)


def attention_with(q_sel_BND, k_sel_BND, tau, implementation=None):
    """The memory statistic [B, N] that attention returns for this selecting head."""
    heads_BNHD = np.zeros((*q_sel_BND.shape[:2], 1, 4), np.float32)
    _, forgotten_BN = selective_attention(
        heads_BNHD,
        heads_BNHD,
        heads_BNHD,
        q_sel=q_sel_BND,
        k_sel=k_sel_BND,
        scale=1.0,
        memory_tau=tau,
        implementation=implementation,
    )
    return forgotten_BN


class TestMemoryLoss:
    @pytest.mark.parametrize(
        ("tau", "num_tokens", "expected"),
        [
            # The one entry of F that can differ from 0 among 4 tokens is F[4, 2] = S[3, 2]: 0.4 in the first layer, 2
            # in the second. M = 1, 2, 3, 4 - 0.4 and 1, 2, 3, 4 - min(2, 1).
            (1.0, 4, (3.6 + 3.0) / (2 * 4)),
            # M[4] = 4 - 0.4 / 2 and 4 - 2 / 2.
            (2.0, 4, (3.8 + 3.0) / (2 * 4)),
            # M[4] = 4 - 0.4 / 4 and 4 - 2 / 4.
            (4.0, 4, (3.9 + 3.5) / (2 * 4)),
            # The fourth token is padding: M = 1, 2, 3 in both.
            (1.0, 3, (3.0 + 3.0) / (2 * 3)),
        ],
    )
    def test_four_tokens_by_hand(self, tau, num_tokens, expected):
        forgotten = []
        for strength in (0.4, 2.0):
            q_sel = np.array([0, 0, strength, 0], np.float32).reshape(1, 4, 1)
            k_sel = np.array([0, 1, 0, 0], np.float32).reshape(1, 4, 1)
            forgotten.append(attention_with(q_sel, k_sel, tau))
        weights_BN = (np.arange(4) < num_tokens).astype(np.float32)[None]
        np.testing.assert_allclose(memory_loss(jnp.stack(forgotten), weights_BN), [expected], rtol=1e-6)

    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    @pytest.mark.parametrize("tau", [1.0, 0.3])
    def test_equals_the_float64_definition(self, implementation, tau):
        rng = np.random.default_rng(0)
        layers, batch, length, width = 3, 4, 9, 5
        q_LBND, k_LBND = rng.normal(size=(2, layers, batch, length, width)).astype(np.float32)
        weights_BN = (np.arange(length) < np.array([9, 5, 1, 0])[:, None]).astype(np.float32)
        masks = [
            literal_mask(q.astype(float), k.astype(float), 1.0, rule=RULES["paper"])
            for q, k in zip(q_LBND, k_LBND, strict=True)
        ]
        forgotten = [attention_with(q, k, tau, implementation) for q, k in zip(q_LBND, k_LBND, strict=True)]
        actual_B = memory_loss(jnp.stack(forgotten), weights_BN)
        np.testing.assert_allclose(actual_B, oracle_memory_loss(np.stack(masks), weights_BN, tau), rtol=1e-5)
        assert actual_B[3] == 0, "a row of padding costs nothing"

    def test_nothing_forgotten_costs_one(self):
        """Then the last token remembers all n, and the loss is n / n."""
        np.testing.assert_allclose(memory_loss(np.zeros((2, 3, 7), np.float32), np.ones((3, 7), np.float32)), 1.0)
        np.testing.assert_array_equal(memory_per_query(np.zeros((1, 1, 3), np.float32))[0, 0], [1, 2, 3])

    def test_gradient_reaches_the_selecting_head_only_below_tau(self):
        k_sel = np.array([0, 1, 0, 0], np.float32).reshape(1, 4, 1)
        weights_BN = np.ones((1, 4), np.float32)

        def loss(strength):
            q_sel = jnp.zeros((1, 4, 1)).at[0, 2, 0].set(strength)
            return memory_loss(attention_with(q_sel, k_sel, 1.0)[None], weights_BN)[0]

        np.testing.assert_allclose(jax.grad(loss)(0.4), -1 / 4, rtol=1e-6)
        assert jax.grad(loss)(1.5) == 0

    def test_a_batch_of_padding_has_a_finite_gradient(self):
        gradient = jax.grad(lambda x: memory_loss(x, jnp.zeros((2, 4))).sum())(jnp.ones((3, 2, 4)))
        np.testing.assert_array_equal(gradient, 0)
