"""What a layer holds and what arrives, made up, for kernels of eviction times."""

import jax.numpy as jnp
import numpy as np

from inference_budget.eviction import Arriving, Columns
from selective_attention import TransformerConfig

UNOPTIMISED = {"xla_backend_optimization_level": 0}


def config_of(attention, width=8, heads=1, **changes):
    sizes = {"vocab_size": 8, "num_layers": 1, "num_heads": heads, "d_model": 8, "mlp_dim": 8, "max_length": 4096}
    return TransformerConfig(**sizes, head_dim=width, dtype="float32", attention=attention, **changes)


def held_and_new(rng, batch, num_held, length, width=8, heads=(1, 1)):
    """Columns of sequences at different points of theirs, and what arrives; the slots are in no order, some free.

    `heads` are those of queries and those of keys.
    """
    position = np.full((batch, num_held + length), -1, np.int32)
    start, budget = np.zeros(batch, np.int32), rng.integers(2, num_held + length, batch).astype(np.int32)
    f = np.zeros(position.shape, np.float32)
    count = rng.integers(0, length + 1, batch).astype(np.int32)
    count[0], budget[0] = length, 2
    if num_held:
        budget = np.minimum(budget, num_held)
        start = rng.integers(budget, 3 * num_held).astype(np.int32)
        for row in range(batch):
            others = rng.permutation(np.arange(1, start[row]))[: budget[row] - 1]
            slots = [0, *(1 + rng.permutation(num_held - 1)[: budget[row] - 1])]
            position[row, slots] = [0, *others]
            f[row, slots[1:]] = np.abs(rng.normal(size=budget[row] - 1)).round(1)  # with ties
    for row in range(batch):
        position[row, num_held : num_held + count[row]] = start[row] + np.arange(count[row])
    q = jnp.asarray(rng.normal(size=(batch, length, heads[0], width)) * 2, jnp.float32)
    k = jnp.asarray(rng.normal(size=(batch, num_held + length, heads[1], width)), jnp.float32)
    k = jnp.where((position < 0)[..., None, None], jnp.nan, k)  # free slots hold anything
    columns = Columns(k, k, None, jnp.asarray(position), jnp.asarray(f), None)
    return columns, q, Arriving(*(jnp.asarray(x) for x in (start, count, budget)), 3)
