"""Plans decoding: for each cache its largest batch, or the one that was asked for, and what follows from its step."""

import functools
import math
from collections.abc import Callable

from launch.plan.decode.batches import largest_batch
from launch.plan.decode.caches import CacheChoice
from launch.plan.decode.compiler import row_bytes, weight_bytes
from launch.plan.decode.result import CacheDoesNotFit, DecodePlan, DecodeStep, Slice
from launch.plan.result import OversizedStep, Shortage
from launch.slices import Topology
from selective_attention import TransformerConfig
from selective_attention.sharding import DATA, TENSOR
from trainer.errors import ConfigError

Measure = Callable[[CacheChoice, int, Slice], DecodeStep | OversizedStep]
TEMPORARIES = 2**29  # bytes, about: what the batch that is tried first leaves room for
HOUR = 3600  # seconds


def make_slice(config: TransformerConfig, topology: Topology, mesh: dict[str, int], batch: int | None) -> Slice:
    """The slice, split as `mesh` says: by default a whole model on every chip.

    Raises:
      ConfigError: a mesh that decoding or the slice cannot have, or a batch that it does not divide.
    """
    chips, tensor = topology.num_chips, mesh.get(TENSOR, 1)
    for axis in sorted(mesh.keys() - {DATA, TENSOR}):
        raise ConfigError(f"--mesh: decoding splits rows over data and heads over tensor; leave out {axis}")
    if tensor < 1 or chips % tensor or mesh.get(DATA, -1) not in (-1, chips // tensor):
        asked = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        raise ConfigError(
            f"--topology={topology.name}: mesh {asked} does not fit its {chips} chips; data times tensor is {chips}"
        )
    if config.num_kv_heads % tensor:
        raise ConfigError(
            f"--mesh: tensor={tensor} does not divide num_kv_heads={config.num_kv_heads}; every chip would do all heads"
        )
    place = Slice(topology.name, chips, tensor)
    if batch is not None and (batch < 1 or batch % place.data):
        raise ConfigError(
            f"--batch={batch} is the batch of the slice, which {topology.name} splits into {place.data} parts; give a "
            f"multiple of {place.data}"
        )
    return place


def plan(
    choice: CacheChoice, topology: Topology, place: Slice, batch: int | None, price: float, measure: Measure
) -> DecodePlan | CacheDoesNotFit:
    """The plan of one cache.

    Args:
      choice: the cache.
      topology, place: the slice, and how it is split.
      batch: rows of the slice; None for the largest that fits.
      price: dollars for an hour of a chip; 0 where that is not known.
      measure: the compiler.
    """
    limit = topology.chip.hbm_bytes

    @functools.cache
    def compiled(rows: int) -> DecodeStep | OversizedStep:
        return measure(choice, rows * place.data, place)

    def used(rows: int) -> float:
        step = compiled(rows)
        if isinstance(step, DecodeStep):
            return sum(step.hbm_bytes.values())
        # It has refused, whatever the number, which it rounds, says.
        return max(step.shortage.needed_bytes or math.inf, math.nextafter(limit, math.inf))

    if batch is None:
        fixed = weight_bytes(choice) / place.tensor
        guess = (limit - fixed - TEMPORARIES) / (row_bytes(choice) / place.tensor)
        rows = largest_batch(used, limit, fixed, max(int(guess), 1)) or 1
    else:
        rows = batch // place.data
    step, total = compiled(rows), used(rows)
    same = (choice.name, choice.policy, choice.budgets.tokens, choice.budgets.memory_factor, rows * place.data)
    if isinstance(step, DecodeStep) and total > limit:
        line = f"needs {total / 2**30:.2f} GiB of HBM on each chip, which has {limit / 2**30:.2f}"
        mesh = {DATA: place.data, TENSOR: place.tensor}
        step = OversizedStep(mesh, step.hbm_bytes, step.weight_bytes, Shortage(line, None, total, limit))
    if isinstance(step, OversizedStep):
        return CacheDoesNotFit(*same, limit, step)
    step_ms = sum(step.step_ms_by_part.values())
    tokens = rows * place.data / (step_ms / 1e3)
    return DecodePlan(
        *same,
        largest=batch is None,
        hbm_total_bytes=int(total),
        hbm_limit_bytes=limit,
        step_ms=step_ms,
        hbm_limit_ms=1e3 * step.needed_bytes / topology.chip.hbm_bandwidth,
        tokens_per_second=tokens,
        tokens_per_second_per_chip=tokens / place.chips,
        tokens_per_dollar=HOUR * tokens / place.chips / price if price else None,
        step=step,
    )
