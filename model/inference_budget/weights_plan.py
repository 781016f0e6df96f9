"""The shape of the work of `weights_kernel`: what is taken in together, by what fits into VMEM."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from selective_attention.implementations.tpu.columns import LANES, pad, round_up
from selective_attention.implementations.tpu.plan import MIB, tiling_here
from selective_attention.selection import Rule, Selection

from .policies import EvictionPolicy

HEIGHT = 8  # sublanes of a register
ROWS = (1, 2, 4, 8, 16, 32)  # sequences that are taken in together, at most; more hide more of a step's latencies
QUERIES = (64, 32, 16)  # of a block
SPAN = 512  # columns that a loop over them takes at a time
COPIED = 256  # columns whose keys are fetched at a time
SPARE = 2 * MIB  # of VMEM, beside what is counted


class Job(NamedTuple):
    """Logits of a register: of one head in each part."""

    heads: tuple[int, ...]
    depth: int | None  # their number within a part; None where they select


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of one call, after padding."""

    policy: EvictionPolicy
    rule: Rule
    num_held: int
    num_columns: int
    num_heads: int  # that attend
    num_kv_heads: int
    width: int  # of a head: 64 or 128
    own_head: bool  # selects, behind all others
    groups: int
    rows: int  # sequences of a group
    parts: int  # of the heads, below one another
    block_q: int
    blocks_q: int
    buffers: int  # of keys

    @property
    def height(self) -> int:
        return self.rows * self.parts

    @property
    def depth(self) -> int:
        """Heads of a part."""
        return self.num_heads // self.parts

    @property
    def chunks(self) -> int:
        return self.num_columns // LANES

    @property
    def span(self) -> int:
        return min(SPAN, self.num_columns)

    @property
    def copied(self) -> int:
        return min(COPIED, self.num_columns)

    @property
    def selecting_head(self) -> int | None:
        if self.rule.selection is Selection.OFF:
            return None
        return self.num_heads if self.own_head else 0

    def kv_head(self, head: int) -> int:
        return head * self.num_kv_heads // self.num_heads

    def jobs(self) -> list[tuple[slice, list["Job"]]]:
        """What is multiplied with which rows of keys: whole tiles of 128, in which those of all the job's heads lie."""
        jobs = [Job(tuple(range(d * self.parts, (d + 1) * self.parts)), d) for d in range(self.depth)]
        if self.selecting_head is not None:
            jobs.append(Job((self.selecting_head,) * self.parts, None))
        of_tiles: dict[tuple[int, int], list[Job]] = {}
        for job in jobs:
            tiles = [self.kv_head(head) * self.width // LANES for head in job.heads]
            of_tiles.setdefault((min(tiles), max(tiles) + 1), []).append(job)
        return [(slice(first * LANES, end * LANES), jobs) for (first, end), jobs in of_tiles.items()]

    def seen(self, i: Any, columns: int) -> Any:
        """How many blocks of so many columns the queries of block i see anything of."""
        end = jnp.minimum(self.num_held + (i + 1) * self.block_q, self.num_columns)
        return jax.lax.div(end + columns - 1, columns)

    def in_groups(self, x: Array, value: int) -> Array:
        """[B, ...] to [groups, height, ...], with `value` where a group has no sequence."""
        grouped = pad(x, self.groups * self.rows, 0, value).reshape(self.groups, self.rows, *x.shape[1:])
        return jnp.concatenate([grouped] * self.parts, axis=1)

    def to_chunks(self, x: Array, value: int) -> Array:
        """[B, M] to [groups * chunks, height, 128]."""
        x = self.in_groups(pad(x, self.num_columns, 1, value), value)
        return jnp.swapaxes(x.reshape(self.groups, self.height, -1, LANES), 1, 2).reshape(-1, self.height, LANES)

    def from_chunks(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, to [B, M]."""
        x = jnp.swapaxes(x.reshape(self.groups, -1, self.height, LANES), 1, 2)[:, : self.rows]
        return x.reshape(self.groups * self.rows, -1)[: shape[0], : shape[1]]

    def to_lanes(self, x: Array) -> Array:
        """[B] to [groups * height, 128]."""
        x = self.in_groups(x, 0).reshape(-1, 1)
        return jnp.broadcast_to(x, (x.shape[0], LANES))


class Sizes(NamedTuple):
    rows: int
    parts: int
    block_q: int
    buffers: int


def find_sizes(q: Array, k: Array) -> Sizes | None:
    """How many sequences and queries are taken in together; None where not even one sequence fits into VMEM."""
    (batch, length, num_heads, head_dim), columns = q.shape, _padded_columns(k.shape[1])
    vmem, width = tiling_here().vmem - SPARE, 64 if head_dim <= 64 else LANES
    # One more head than there are: the selecting one may be there besides.
    key_bytes = round_up((k.shape[2] + 1) * width, LANES) * min(COPIED, columns) * k.dtype.itemsize
    found = None
    for rows in ROWS:
        parts = max(HEIGHT // rows, 1)
        if num_heads % parts or (found is not None and found.rows >= -(-batch // 2)):  # work for two cores
            continue
        height = rows * parts
        for block_q in QUERIES:
            logits = rows * num_heads * block_q * columns * 4
            of_queries = 3 * rows * (num_heads + 1) * block_q * LANES * q.dtype.itemsize
            rest = logits + of_queries + height * columns * 4 * (block_q + 13)
            buffers = (vmem - rest) // (rows * key_bytes)
            if logits <= vmem // 2 and buffers >= 2:
                found = Sizes(rows, parts, min(block_q, max(QUERIES[-1], round_up(length, 16))), min(buffers, 8))
                break
    return found


def _padded_columns(num_columns: int) -> int:
    return round_up(num_columns, next((n for n in (LANES, COPIED) if num_columns <= n), SPAN))


def make_plan(policy: EvictionPolicy, rule: Rule, q: Array, k: Array, *, own_head: bool) -> Plan:
    """The plan of a call of `weights_kernel.times`, whose arguments these are; `fits` is true of them."""
    (batch, length, num_heads, head_dim), sizes = q.shape, find_sizes(q, k)
    assert sizes is not None  # `fits` has said so
    return Plan(
        policy=policy,
        rule=rule,
        num_held=k.shape[1] - length,
        num_columns=_padded_columns(k.shape[1]),
        num_heads=num_heads,
        num_kv_heads=k.shape[2],
        width=64 if head_dim <= 64 else LANES,
        own_head=own_head,
        groups=-(-batch // sizes.rows),
        blocks_q=-(-length // sizes.block_q),
        **sizes._asdict(),
    )
