"""What would make a step fit that does not: changes to the config, each of them compiled."""

from collections.abc import Sequence

from launch.plan.planner import Change, Planner
from launch.plan.result import DoesNotFit, Plan, Remedy, refusal
from launch.plan.several import compile_all
from launch.slices import find
from trainer.errors import ConfigError
from trainer.settings import Settings, changed


def flags(change: Change) -> str:
    """A change as the trainer takes it."""
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


def candidates(config: Settings, failed: Plan | DoesNotFit) -> tuple[list[Change], list[Change]]:
    """Single changes, and after them all together: recompute layers, shard the state over more chips, split the batch.
    Where VMEM is too small, only fewer heads on a chip help. Sharding never leaves a slice.
    """
    mesh, slices = failed.mesh, failed.place.slices
    if isinstance(failed, DoesNotFit) and failed.step.shortage.of == "VMEM":
        halves = [axis for axis in ("data", "fsdp") if mesh[axis] % (2 * (slices if axis == "data" else 1)) == 0]
        return [{f"mesh.{axis}": mesh[axis] // 2, "mesh.tensor": 2 * mesh["tensor"]} for axis in halves[:1]], []
    single: list[Change] = []
    if config.model.remat != "block":
        single.append({"model.remat": "block"})
    fsdp = mesh["data"] * mesh["fsdp"] // slices
    if fsdp > mesh["fsdp"]:
        single.append({"mesh.data": slices, "mesh.fsdp": fsdp})
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"] * config.accumulation)
    if rows % 2 == 0:
        single.append({"accumulation": config.accumulation * 2})
    together: Change = {name: value for change in single for name, value in change.items()}
    combined = [together] if len(single) > 1 else []
    if rows % 4 == 0:
        most = rows & -rows  # the largest power of two that divides the rows of a chip
        combined.append(together | {"accumulation": config.accumulation * most})
    return single, combined


def try_remedies(config: Settings, failed: Plan | DoesNotFit, planner: Planner) -> list[Remedy]:
    """One row for each change that was compiled. Changes together are compiled only where none alone is enough."""
    single, combined = candidates(config, failed)
    rows = _try(config, single, failed, planner)
    if not any("step_ms" in row for row in rows):
        rows += _try(config, combined, failed, planner)
    return rows


def _try(config: Settings, changes: Sequence[Change], failed: Plan | DoesNotFit, planner: Planner) -> list[Remedy]:
    topology = find(failed.place.topology)

    def attempt(change: Change) -> Remedy:
        row: Remedy = {"change": flags(change)}
        try:
            made = planner(changed(config, change), topology, failed.place.slices)
        except ConfigError as error:
            return row | {"needs": str(error)}
        if isinstance(made, DoesNotFit) or not made.fits:
            return row | {"needs": refusal(made, "more HBM than the chip has")}
        return row | {"step_ms": made.step_ms, "headroom": made.headroom}

    return compile_all(attempt, changes, "remedies") if changes else []
