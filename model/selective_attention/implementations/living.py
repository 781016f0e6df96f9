"""The keys of one sequence that are not yet forgotten, in a list that gets shorter as F grows.

Keys lie in blocks of C slots, at first where they are in the sequence. At the start of a block of queries, the living
among the earlier keys are moved together into the first blocks, in their order, if that saves whole blocks. So a key
moves only while others before it die, and nothing moves where nothing is forgotten. What dies stays dead.

Shape letters: those of `blockwise.py`.
"""

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from ..selection import Projections, Queries, Rule, Seen, Selection, forgotten_above

NOBODY = 2**30  # position of an empty slot: later than every query, so that none sees or selects it
Arrays = TypeVar("Arrays", bound=tuple[Array | None, ...])  # of keys, in blocks
Sums = TypeVar("Sums", bound=tuple[Array | None, ...])
MOVES_PER_TILE = 4  # blocks of keys that can be moved, there and back, in the time of attending to one


class Layout(NamedTuple):
    """Which key is in which slot.

    The first `listed` blocks hold what is left of the first `taken` blocks of the sequence; nothing is in the blocks
    between `listed` and `taken`, and later keys are where they were.
    """

    position: Array  # int32 [J, C]
    listed: Array  # int32
    taken: Array  # int32

    @classmethod
    def of_sequence(cls, position_JC: Array, like: Array) -> "Layout":
        """All keys where they are in the sequence; varying over the mesh axes of `like`."""
        zero = 0 * like.reshape(-1)[0].astype(jnp.int32)
        return cls(position_JC + zero, zero, zero)

    def block(self, n: Array) -> Array:
        """Where the n-th block is that holds any keys."""
        return jnp.where(n < self.listed, n, n - self.listed + self.taken)

    def num_blocks(self, until: Array) -> Array:
        """How many blocks hold keys of the sequence's first `until` blocks."""
        return self.listed + jnp.maximum(until - self.taken, 0)

    def holds(self) -> Array:
        """Bool [J, 1]: the blocks that hold any keys."""
        block_J = jnp.arange(self.position.shape[0])[:, None]
        return (block_J < self.listed) | (block_J >= self.taken)


def reach(projections: Projections, seen: Seen, rule: Rule, *, by_bound: bool = False) -> Array | None:
    """float32 [B], the F above which keys are forgotten for good; None where there can be none.

    With `by_bound` from the rule's `logit_bound`, if it has one, which costs no pass over q and k and is looser.
    """
    q, k, _ = projections[:3]
    batch, num_keys = k.shape[:2]
    if rule.selection in (Selection.OFF, Selection.LEAKY):  # F does not grow
        nothing_ends = seen.kv_segment_ids is None and seen.evict_at is None
        return None if nothing_ends else jnp.full(batch, jnp.inf)
    if seen.evict_at is not None and rule.tau is not None:
        return None  # what is forgotten counts until it is evicted
    if isinstance(rule.logit_bound, float) and math.isinf(rule.logit_bound):
        return None
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    if by_bound and rule.logit_bound is not None:
        most_B = jnp.broadcast_to(2 * jnp.asarray(rule.logit_bound, dtype), batch)
    else:
        most_B = _most_above_own_key(q.astype(dtype), k.astype(dtype), seen.offset, rule.scale)
    most_B = jax.lax.stop_gradient(most_B)
    reach_B = forgotten_above(most_B / 2, num_keys, dtype=dtype)
    if rule.tau is not None:
        reach_B = jnp.maximum(reach_B, rule.tau)
    if seen.evict_at is not None:  # a query that does not see its own key may see only what is all but forgotten
        reach_B = jnp.where(jnp.all(seen.evict_at > jnp.arange(num_keys), axis=1), reach_B, jnp.inf)
    return reach_B


def _most_above_own_key(q_BNHD: Array, k_BMKD: Array, offset: Array | int, scale: float) -> Array:
    """[B]: what no logit exceeds that of its query with its own key by. It is at most 2 b, and mostly far less."""
    batch, length, num_heads, _ = q_BNHD.shape
    q_BNKGD = q_BNHD.reshape(batch, length, k_BMKD.shape[2], num_heads // k_BMKD.shape[2], -1)
    own_BNKD = jax.lax.dynamic_slice_in_dim(k_BMKD, offset, length, axis=1)
    own_BNKG = scale * jnp.sum(q_BNKGD * own_BNKD[:, :, :, None], axis=-1)
    largest_B1K1 = jnp.linalg.norm(k_BMKD, axis=-1).max(axis=1)[:, None, :, None]
    most_BNKG = abs(scale) * jnp.linalg.norm(q_BNKGD, axis=-1) * largest_B1K1 - own_BNKG
    return most_BNKG.max(axis=(1, 2, 3))


def shortened(
    layout: Layout, f_JC: Array, dead_JC: Array, until: Array, remaining: Array
) -> tuple[Layout, Array, Array]:
    """The layout without the dead among the sequence's first `until` blocks, if that pays.

    `remaining` blocks of queries are to come. Returns the new layout, F in it, and the first block that changed.
    """
    num_blocks, columns = f_JC.shape
    block_J = jnp.arange(num_blocks)[:, None]
    alive_JC = ~dead_JC & (layout.position < NOBODY) & layout.holds() & (block_J < until)
    listed = (jnp.sum(alive_JC, dtype=jnp.int32) + columns - 1) // columns
    first = jnp.argmin(jnp.append(alive_JC.all(axis=1), False)).astype(jnp.int32)
    saved = layout.num_blocks(until) - listed
    pays = (saved > 0) & (MOVES_PER_TILE * saved * remaining >= listed - first)

    def move():
        slot_JC = jnp.nonzero(alive_JC.reshape(-1), size=f_JC.size, fill_value=NOBODY)[0].reshape(f_JC.shape)
        position_JC = layout.position.reshape(-1).at[slot_JC].get(mode="fill", fill_value=NOBODY)
        moved_f_JC = f_JC.reshape(-1).at[slot_JC].get(mode="fill", fill_value=0)
        later_J = block_J >= until
        return (
            Layout(jnp.where(later_J, layout.position, position_JC.astype(jnp.int32)), listed, until),
            jnp.where(later_J, f_JC, moved_f_JC),
            first,
        )

    return jax.lax.cond(pays, move, lambda: (layout, f_JC, layout.listed))


def dropped(layout: Layout, queries: Queries, kv_segment_JC: Array | None) -> Array:
    """How many keys that each query would see have been dropped because it would not feel them: int32 [R]."""
    natural_JC = jnp.arange(layout.position.size, dtype=jnp.int32).reshape(layout.position.shape)
    taken_JC = natural_JC < layout.taken * layout.position.shape[1]
    listed_JC = (layout.position < NOBODY) & (jnp.arange(len(natural_JC))[:, None] < layout.listed)
    if queries.segment is None or kv_segment_JC is None:
        return jnp.broadcast_to(taken_JC.sum() - listed_JC.sum(), queries.position.shape)
    segment = queries.segment[0]  # nothing is left of earlier ones
    taken_JC &= kv_segment_JC == segment
    listed_JC &= of_keys(kv_segment_JC, layout.position) == segment
    here_R = (queries.segment == segment) & (segment >= 0)
    return jnp.where(here_R, taken_JC.sum() - listed_JC.sum(), 0)


def of_keys(x_JC: Array, position: Array) -> Array:
    """Of the keys at these positions; of any key for an empty slot."""
    return x_JC.reshape(-1).at[position].get(mode="clip")


def filled(held: Arrays, whole: Arrays, layout: Layout, first: Array) -> Arrays:
    """`held` with the listed blocks from `first` on taken from `whole`, which has all keys where they were."""

    def fill(j, held):
        return jax.tree.map(lambda x, w: x.at[j].set(_rows(w, layout.position[j])), held, whole)

    return jax.lax.fori_loop(first, layout.listed, fill, held)


def unfolded(held: Arrays, sums: Sums, whole: Arrays, layout: Layout, earlier: Layout) -> tuple[Arrays, Sums]:
    """The transpose of a change from the layout `earlier`: what is `held` of `whole`, and sums over queries for each
    key, zero for those that had been dropped.
    """
    changed = (layout.listed != earlier.listed) | (layout.taken != earlier.taken)
    same_J = (layout.position == earlier.position).all(axis=1) & earlier.holds()[:, 0]
    first = jnp.argmin(jnp.append(same_J, False)).astype(jnp.int32)
    num_slots = layout.position.size

    def find():
        listed_JC = jnp.where(layout.holds(), layout.position, NOBODY)
        slot_of_key = jnp.full(num_slots, NOBODY, jnp.int32)
        return slot_of_key.at[listed_JC.reshape(-1)].set(jnp.arange(num_slots, dtype=jnp.int32), mode="drop")

    slot_of_key = jax.lax.cond(changed, find, lambda: layout.position.reshape(-1))
    count = jnp.where(changed, earlier.num_blocks(layout.taken), first)

    def unfold(n, carry):
        held, sums = carry
        j = earlier.block(count - 1 - (n - first))  # the last first: keys come from earlier blocks
        position_C = earlier.position[j]
        slot_C = slot_of_key.at[position_C].get(mode="fill", fill_value=NOBODY)
        moved = jax.lax.optimization_barrier(jax.tree.map(lambda x: _rows(x, slot_C, fill=True), sums))
        return (
            jax.tree.map(lambda x, w: x.at[j].set(_rows(w, position_C)), held, whole),
            jax.tree.map(lambda x, y: x.at[j].set(y), sums, moved),
        )

    return jax.lax.fori_loop(first, count, unfold, (held, sums))


def _rows(x: Array, slot_C: Array, *, fill: bool = False) -> Array:
    """What x [J, C], [J, C, D] or [J, K, C, D] has in these slots, a block; with `fill`, zeros for no slot."""
    columns = slot_C.shape[0]
    block_C, column_C = slot_C // columns, slot_C % columns
    mode = {"mode": "fill", "fill_value": 0} if fill else {"mode": "clip"}
    if x.ndim < 4:
        return x.at[block_C, column_C].get(**mode)
    return jnp.swapaxes(x.at[block_C, :, column_C].get(**mode), 0, 1)
