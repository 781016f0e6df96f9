"""The shape of the TPU kernels' work: sides of tiles, groups of heads and chunks of queries, by generation."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from ...selection import Rule, Selection
from .columns import LANES, round_up

MIB = 2**20


class Tiling(NamedTuple):
    """Of one generation: the sides of tiles, in positions, and the VMEM in bytes that a kernel may take."""

    forward: int
    backward: int
    forward_float32: int
    backward_float32: int
    vmem: int


# The fastest in bfloat16 by their schedules, at N = 2,048 and 12 heads of 64: `python benchmarks/tpu_kernels.py
# --length 2048 --generations v4,v5e,v5p,v6e --blocks 128,256,512`. Larger tiles pay a grid step's fixed price less
# often, and leave out more above the diagonal; v4 has no VMEM for larger ones backward. In float32 (`--dtype float32`)
# tiles of 256 take up to 6% longer than of 512 on v5p and v6e, by programs a quarter as long.
TILINGS = {
    "v4": Tiling(512, 256, 256, 128, 16 * MIB),
    "v5e": Tiling(512, 512, 256, 256, 96 * MIB),
    "v5p": Tiling(512, 512, 256, 256, 48 * MIB),
    "v6e": Tiling(512, 512, 256, 256, 96 * MIB),
}
ELSEWHERE = Tiling(256, 256, 128, 128, 16 * MIB)  # interpreted, or on another TPU: fits any
# What the backward kernel takes of VMEM beside its windows and gradients, fitted to the compiler's accounts of groups
# of 768 to 1,024 in width: in all, for each pair of a tile (F, S and the logits' gradients), for registers spilled.
FIXED_BYTES, BYTES_A_PAIR, SPILLED = 9 * MIB // 4, 12, 2.5
GROUP_WIDTH = 1024  # of all heads that one grid step works on; more would neither fit v4's VMEM nor the registers


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """Static shape and rule of one attention call, after padding; everything that a kernel is specialised to."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # 64 or 128
    value_dim: int  # 64 or 128
    select_dim: int  # 64 or 128
    head_groups: int  # parts of the heads; each has its own pass over the grid, and computes F for itself
    block_q: int
    block_k: int
    backward_block: int  # block_q and block_k of the backward kernel
    vmem: int  # bytes that a kernel may take
    scale: float
    selection: Selection
    tau: float | None
    evict: bool
    drops: bool  # whether the kernels leave out what is forgotten for good

    @property
    def selects(self) -> bool:
        return self.selection is not Selection.OFF

    @property
    def group_heads(self) -> int:
        return self.num_heads // self.head_groups

    @property
    def group_kv_heads(self) -> int:
        return self.num_kv_heads // self.head_groups

    @property
    def parts(self) -> int:
        """Of 128 keys each, that a block of keys is forgotten by."""
        return self.block_k // LANES

    @property
    def columns(self) -> int:
        return self.block_q // LANES

    def kv_head(self, head: int) -> int:
        """The key/value head, within the group, that a query head of the group reads."""
        return head * self.num_kv_heads // self.num_heads

    def last_block_k(self, block_q_index: Array | int, offset: Array | int) -> Array:
        """Index of the last block of keys that a block of queries sees anything of."""
        return jax.lax.div(offset + (block_q_index + 1) * self.block_q - 1, self.block_k)

    def first_block_q(self, block_k_index: Array | int, offset: Array | int) -> Array:
        """Index of the first block of queries that sees anything of a block of keys."""
        return jax.lax.div(jnp.maximum(block_k_index * self.block_k - offset, 0), self.block_q)


def make_plan(q: Array, k: Array, v: Array, q_sel: Array, *, evict: bool, drops: bool, rule: Rule) -> KernelPlan:
    """Pads heads to whole lane tiles and lengths to whole blocks, and chooses the blocks."""
    head_dim, value_dim, select_dim = (64 if x.shape[-1] <= 64 else 128 for x in (q, v, q_sel))
    tiling = tiling_here()
    forward, backward = blocks(tiling, q.dtype, q.shape[1], k.shape[1])
    plan = KernelPlan(
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=head_dim,
        value_dim=value_dim,
        select_dim=select_dim,
        head_groups=1,
        block_q=forward,
        block_k=forward,
        backward_block=backward,
        vmem=tiling.vmem,
        scale=rule.scale,
        selection=rule.selection,
        tau=rule.tau if rule.selection is not Selection.OFF else None,
        evict=evict,
        drops=drops and rule.selection not in (Selection.OFF, Selection.LEAKY),
    )
    groups = _head_groups(plan, q.shape[0], round_up(q.shape[1], forward), q.dtype)
    return dataclasses.replace(plan, head_groups=groups)


def tiling_here() -> Tiling:
    """That of the TPU that is traced for: the mesh's, which may only be described, or else this machine's."""
    if not pltpu.is_tpu_device():
        return ELSEWHERE
    return TILINGS.get(str(pltpu.get_tpu_info().chip_version), ELSEWHERE)


def blocks(tiling: Tiling, dtype: jnp.dtype, queries: int, keys: int) -> tuple[int, int]:
    """Sides of the forward and of the backward kernel's tiles, which are square.

    No length is padded to more than a multiple of 256 for the sake of larger tiles.
    """
    padded = math.gcd(*(round_up(n, 2 * LANES if n > LANES else LANES) for n in (queries, keys)))
    forward, backward = tiling[2:4] if dtype == jnp.float32 else tiling[:2]
    return math.gcd(forward, padded), math.gcd(backward, padded)


def most_queries(plan: KernelPlan, dtype: jnp.dtype, key_dtype: jnp.dtype) -> int:
    """How many queries the backward kernel can take at once; it gives gradients of keys and values in `key_dtype`."""
    width, side = plan.group_heads * max(plan.head_dim, plan.value_dim), plan.backward_block
    # Windows, two of each: on q, k, v, d_out and dq in `dtype`, on dk and dv in `key_dtype`; and k and v as rows.
    row = side * ((12 + SPILLED) * jnp.dtype(dtype).itemsize + 4 * jnp.dtype(key_dtype).itemsize)
    return int((plan.vmem - FIXED_BYTES - BYTES_A_PAIR * side**2 - width * row) / (width * 4))


def _head_groups(plan: KernelPlan, batch: int, queries: int, dtype: jnp.dtype) -> int:
    """Into how many passes the heads are split: few enough heads to fit, and work for two cores from one sequence.

    Each pass computes F anew. That is worth up to twice the passes where it spares the backward kernel its chunks.
    """
    narrowest = min(plan.head_dim, plan.value_dim)
    fitting = [
        dataclasses.replace(plan, head_groups=n)
        for n in range(1, plan.num_kv_heads + 1)
        if plan.num_kv_heads % n == 0 and (n == 1 or (plan.num_kv_heads // n * narrowest) % LANES == 0)
    ]
    small = [p for p in fitting if p.group_heads * max(p.head_dim, p.value_dim) <= GROUP_WIDTH] or fitting[-1:]
    even = [p for p in small if p.head_groups % 2 == 0] if batch == 1 else []
    few = [p for p in even or small if p.head_groups <= 2 * (even or small)[0].head_groups]
    whole = [p for p in few if most_queries(p, dtype, dtype) >= queries]
    return (whole or few[-1:])[0].head_groups
