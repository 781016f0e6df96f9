"""Which tiles the backward TPU kernel visits: those alone in which some query sees a key that is not forgotten.

Shape letters: as in `columns.py`; S steps of the grid.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from .plan import KernelPlan


class Steps(NamedTuple):
    """The grid's last side, of every sequence: blocks of keys in order, and for each its blocks of queries, the last
    one first. A block of keys ends with the first block of queries that it meets, which meets no later one, and so is
    complete. Behind all keys come, without any, the blocks of queries that reach beyond them.
    """

    most: Array  # int32 [], the grid's side: steps of the sequence that has most; others repeat their last one
    tiles: Array  # int32 [B], how many are about keys
    key_block: Array  # int32 [B * S]
    query_block: Array  # int32 [B * S]
    complete: Array  # int32 [B * S], the block of queries that is complete at the end of this block of keys

    @classmethod
    def living(cls, plan: KernelPlan, offset: Array, last_BJ: Array, num_query_blocks: int) -> "Steps":
        """`last_BJ`: the last block of queries that has not forgotten a block of keys."""
        num_key_blocks = last_BJ.shape[1]
        first_J = plan.first_block_q(jnp.arange(num_key_blocks + num_query_blocks), offset)
        is_there_J = jnp.where(jnp.arange(first_J.size) < num_key_blocks, True, first_J < num_query_blocks)
        first_J = jnp.minimum(first_J, num_query_blocks - 1)
        last_BJ = jnp.maximum(jnp.pad(last_BJ, [(0, 0), (0, num_query_blocks)]), first_J)
        end_BJ = jnp.cumsum(jnp.where(is_there_J, last_BJ - first_J + 1, 0), axis=1)
        start_BJ = jnp.pad(end_BJ[:, :-1], [(0, 0), (1, 0)])
        step_S = jnp.arange(num_query_blocks * (num_key_blocks + 1))
        step_BS = jnp.minimum(step_S, end_BJ[:, -1:] - 1)
        ended_BSJ = end_BJ[:, None, :-1] <= step_BS[..., None]

        def of_block(x_BJ: Array) -> Array:
            """[B, S], a value for each block: as a sum of differences, since gathers are slow."""
            return x_BJ[:, :1] + jnp.sum(jnp.where(ended_BSJ, jnp.diff(x_BJ)[:, None], 0), axis=-1)

        block_J = jnp.minimum(jnp.arange(first_J.size), num_key_blocks - 1)
        lists = of_block(block_J[None]), of_block(last_BJ + start_BJ) - step_BS, of_block(first_J[None])
        scalars = end_BJ[:, -1].max(), end_BJ[:, num_key_blocks - 1], *(x.reshape(-1) for x in lists)
        return cls(*(x.astype(jnp.int32) for x in scalars))
