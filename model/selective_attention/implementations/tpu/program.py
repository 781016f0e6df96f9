"""How a TPU kernel is called: its grid, the windows through which it sees HBM, and its scratch, all by name."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .columns import LANES
from .plan import KernelPlan

Window = pl.BlockSpec | tuple[pl.BlockSpec, ...]  # on a block of positions: one, or one for every 128


class Result(NamedTuple):
    window: pl.BlockSpec
    array: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel's memory; batch and groups of heads are the first two sides of the grid, and independent."""

    name: str
    grid: tuple[int | Array, ...]
    windows: dict[str, Window]  # on operands, whether there or not
    results: dict[str, Result]
    scratch: dict[str, pl.MemoryRef]

    def run(
        self, kernel: Callable, scalars: tuple[Array, ...], operands: dict[str, Array], vmem: int, interpret: bool
    ) -> dict[str, Array]:
        """Calls `kernel(*scalars, ref)`, where `ref.name` is an operand's (or a tuple's), a result's or scratch."""
        names = (*operands, *self.results, *self.scratch)

        def body(*refs):
            named = dict(zip(names, refs[len(scalars) :], strict=True))
            kernel(*refs[: len(scalars)], types.SimpleNamespace(**named))

        specs = [self.windows[name] for name in operands]
        inputs = ((x,) * len(s) if isinstance(s, tuple) else x for s, x in zip(specs, operands.values(), strict=True))
        results = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=self.grid,
                in_specs=specs,
                out_specs=[result.window for result in self.results.values()],
                scratch_shapes=list(self.scratch.values()),
            ),
            out_shape=[result.array for result in self.results.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * 2 + (pltpu.ARBITRARY,) * (len(self.grid) - 2),
                vmem_limit_bytes=vmem,
                disable_bounds_checks=True,  # of windows, which never leave their arrays: a quarter of a grid step
            ),
            interpret=interpret,
            name=self.name,
        )(*scalars, *inputs)
        return dict(zip(self.results, results, strict=True))


def on_platform(kernel, operands, scalars):
    """Compiled on TPU, interpreted elsewhere: decided by the platform that is lowered for, not by where this runs."""
    return jax.lax.platform_dependent(
        operands,
        scalars,
        tpu=functools.partial(kernel, interpret=False),
        default=functools.partial(kernel, interpret=True),
    )


def input_windows(
    plan: KernelPlan, query_block: Callable[..., Any], key_block: Callable[..., Any]
) -> dict[str, Window]:
    """On what both kernels read; the block of queries and of keys are functions of the sequence, of the grid's last two
    and of scalars.
    """

    def of_group(block):
        return lambda b, g, *grid: (b, g, block(b, *grid))

    def of_sequence(block):
        return lambda b, g, *grid: (b, 0, block(b, *grid))

    query_row = pl.BlockSpec((1, 1, plan.block_q), of_sequence(query_block))
    key_row = pl.BlockSpec((1, 1, plan.block_k), of_sequence(key_block))
    return {
        "q": _column_windows(plan.block_q, plan.group_heads * plan.head_dim, of_group(query_block)),
        "k": _column_windows(plan.block_k, plan.group_kv_heads * plan.head_dim, of_group(key_block)),
        "v": _column_windows(plan.block_k, plan.group_kv_heads * plan.value_dim, of_group(key_block)),
        "d_out": _column_windows(plan.block_q, plan.group_heads * plan.value_dim, of_group(query_block)),
        "q_sel": _column_windows(plan.block_q, plan.select_dim, of_sequence(query_block)),
        "k_sel": _column_windows(plan.block_k, plan.select_dim, of_sequence(key_block)),
        "d_forgotten": query_row,
        "q_segment": query_row,
        "kv_segment": key_row,
        "evict_at": key_row,
    }


def _column_windows(block: int, rows: int, index: Callable[..., tuple[Any, Any, Any]]) -> tuple[pl.BlockSpec, ...]:
    """Windows on a block of positions of an input [B, R, N], one for every 128; `index` is the whole block's.

    In HBM bfloat16 is tiled by 8 rows of 128 lanes, and a register holds 16 rows. In a window of 128 lanes two such
    tiles follow each other and are loaded at once; a wider one would take a load for each.
    """
    count = block // LANES

    def window(n: int) -> pl.BlockSpec:
        def nth(*grid):
            batch, group, whole = index(*grid)
            return batch, group, whole * count + n

        return pl.BlockSpec((1, rows, LANES), nth)

    return tuple(window(n) for n in range(count))
