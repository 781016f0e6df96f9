"""Plans a config on a topology: what the compiler measured, and what follows from it for the run."""

from collections.abc import Callable
from pathlib import Path

from data import DataError, Manifest
from launch.plan.compiler import measure
from launch.plan.meshes import check_mesh
from launch.plan.result import DoesNotFit, OversizedStep, Place, Plan, Run
from launch.slices import Topology
from trainer.errors import ConfigError
from trainer.metrics.flops import mfu
from trainer.settings import Settings

Change = dict[str, object]  # fields of a config, with dots, and their values
Planner = Callable[[Settings, Topology, int], Plan | DoesNotFit]


def plan(config: Settings, topology: Topology, slices: int = 1) -> Plan | DoesNotFit:
    """The plan of one config.

    Raises:
      ConfigError: the config, the mesh or the batch does not fit the slice.
    """
    chips, chip = topology.num_chips * slices, topology.chip
    check_mesh(config, topology, slices)
    step = measure(config, topology, slices)
    place = Place(topology.name, slices, chips, config.batch_size, config.context_length)
    if isinstance(step, OversizedStep):
        return DoesNotFit(place, chip.hbm_bytes, step)
    total, step_ms = sum(step.hbm_bytes.values()), sum(step.step_ms_by_part.values())
    tokens = config.batch_size * config.context_length
    return Plan(
        place=place,
        hbm_total_bytes=total,
        hbm_limit_bytes=chip.hbm_bytes,
        headroom=1 - total / chip.hbm_bytes,
        step_ms=step_ms,
        mfu=mfu(config, step_ms / 1e3, chips, chip.device_kind),
        tokens_per_second=tokens / (step_ms / 1e3),
        run=make_run(config, step_ms / 1e3, chips, step.state_bytes),
        step=step,
    )


def make_run(config: Settings, step_seconds: float, chips: int, state_bytes: int) -> Run:
    """The whole run: its length and cost in chips, its checkpoints and its data."""
    tokens = config.batch_size * config.context_length * config.steps
    seconds = config.steps * step_seconds
    saves = config.checkpoint
    between = saves.every_steps * step_seconds
    if saves.every_minutes:
        between = min(between, saves.every_minutes * 60)
    forever = config.steps // saves.keep_every_steps if saves.keep_every_steps else 0
    kept = saves.keep_last + saves.keep_best + forever
    dataset_tokens = _dataset_tokens(config.data.path)
    return Run(
        steps=config.steps,
        tokens=tokens,
        days=seconds / 86_400,
        chip_hours=seconds / 3_600 * chips,
        checkpoint_bytes=state_bytes,
        checkpoint_every_seconds=between,
        checkpoints_kept=kept,
        checkpoints_kept_bytes=kept * state_bytes,
        dataset_bytes_for_one_epoch=tokens * (2 if config.model.vocab_size <= 65_536 else 4),
        dataset_tokens=dataset_tokens,
        epochs=tokens / dataset_tokens if dataset_tokens else None,
    )


def _dataset_tokens(folder: str) -> int | None:
    """Of the training split, if the dataset is on this machine and has any."""
    path = Path(folder, "manifest.json")
    if not folder or not path.exists():
        return None
    try:
        return Manifest.from_json(path.read_text()).splits["train"].tokens or None
    except (DataError, KeyError) as error:
        raise ConfigError(f"--config.data.path={folder}: {error}") from error
