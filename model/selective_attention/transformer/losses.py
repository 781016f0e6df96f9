"""The language-model loss and the paper's auxiliary memory loss (section 3)."""

import jax
import jax.numpy as jnp
from jax import Array


def lm_loss(logits_BNV: Array, targets_BN: Array, weights_BN: Array) -> tuple[Array, Array]:
    """Summed cross-entropy and the weight it is summed over; divide to get the mean in nats per token.

    Args:
      logits_BNV: [B, N, V] float32.
      targets_BN: int32 [B, N], ids of the next tokens.
      weights_BN: float32 [B, N], 0 for targets that do not count (padding).
    """
    # A masked sum instead of a gather: it works on logits sharded along V, and fuses with the rest.
    is_target_BNV = jnp.arange(logits_BNV.shape[-1], dtype=targets_BN.dtype) == targets_BN[..., None]
    target_logit_BN = jnp.sum(jnp.where(is_target_BNV, logits_BNV, 0), axis=-1)
    nll_BN = jax.nn.logsumexp(logits_BNV, axis=-1) - target_logit_BN
    return jnp.sum(nll_BN * weights_BN), jnp.sum(weights_BN)


def memory_loss(forgotten_LBN: Array, weights_BN: Array) -> Array:
    """The memory loss of section 3 per sequence, [B] float32: `(sum_l max_i M[l, i]) / (L * n_nonpad)`.

    `M[l, i] = i - (1 / tau) * sum_{k <= i} min(F_l[i, k], tau)` with i counted from 1 is about the number of tokens
    that query i still remembers; the caller multiplies by epsilon (0.1 in the paper) and averages over the batch.

    Args:
      forgotten_LBN: [L, B, N], the second term, as `selective_attention(memory_tau=...)` returns it.
      weights_BN: float32 [B, N], 0 for padding, which counts neither in the maximum nor in n_nonpad.
    """
    memory_LBN = memory_per_query(forgotten_LBN) * (weights_BN > 0)
    count_B = jnp.maximum(jnp.sum(weights_BN > 0, axis=-1), 1)
    return jnp.sum(jnp.max(memory_LBN, axis=-1), axis=0) / (forgotten_LBN.shape[0] * count_B)


def memory_per_query(forgotten_LBN: Array) -> Array:
    """M of section 3, [L, B, N]: how many tokens each query effectively still remembers, itself included."""
    return 1 + jnp.arange(forgotten_LBN.shape[-1], dtype=jnp.float32) - forgotten_LBN


def selection_statistics(f_BNM: Array, weights_BN: Array, tau: float) -> dict[str, Array]:
    """What one layer's mask does to its context: scalars, float32.

    Args:
      f_BNM: F, [B, N, N].
      weights_BN: [B, N], 0 for padding, whose rows do not count.
      tau: F from which a token counts as forgotten, nats.

    Returns:
      mean_f: F averaged over all pairs (query, earlier key or itself).
      forgotten_fraction: of those pairs, the share with F > tau.
      peak_memory: the largest M of section 3 over the queries of a sequence, averaged over sequences, tokens.
      memory_loss: the same over the sequence's length: the layer's term of the memory loss.
    """
    counted_BN = (weights_BN > 0).astype(f_BNM.dtype)
    causal_NM = jnp.tril(jnp.ones(f_BNM.shape[-2:], f_BNM.dtype))
    pairs = jnp.maximum(jnp.sum(counted_BN * jnp.sum(causal_NM, axis=-1)), 1)
    forgotten_BN = jnp.sum(jnp.minimum(f_BNM, tau) / tau, axis=-1)
    peak_B = jnp.max(memory_per_query(forgotten_BN) * counted_BN, axis=-1)
    length_B = jnp.sum(counted_BN, axis=-1)
    sequences = jnp.maximum(jnp.sum(length_B > 0), 1)
    return {
        "mean_f": jnp.sum(jnp.sum(f_BNM * causal_NM, axis=-1) * counted_BN) / pairs,
        "forgotten_fraction": jnp.sum(jnp.sum((f_BNM > tau) * causal_NM, axis=-1) * counted_BN) / pairs,
        "peak_memory": jnp.sum(peak_B) / sequences,
        "memory_loss": jnp.sum(peak_B / jnp.maximum(length_B, 1)) / sequences,
    }
