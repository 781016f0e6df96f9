"""The plan of one config on one topology: what the compiler measured, and what follows from it for the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data import DataError, Manifest
from launch.plan.compiler import measure
from launch.plan.meshes import check_mesh
from launch.slices import Topology
from trainer.errors import ConfigError
from trainer.state import model_config

Plan = dict[str, Any]  # what `--json` writes, and `hlo`, the optimised program
Change = dict[str, Any]  # fields of a config, with dots, and their values
Planner = Callable[[ConfigDict, Topology, int], Plan]


def plan(config: ConfigDict, topology: Topology, slices: int = 1) -> Plan:
    """The plan of one config. Of a step that does not fit it has the state's memory and `error`, and no times.

    Raises:
      ConfigError: the config, the mesh or the batch does not fit the slice.
    """
    chips = topology.num_chips * slices
    check_mesh(config, topology, slices)
    made = measure(config, topology, slices)
    place = {"topology": topology.name, "slices": slices, "chips": chips}
    place |= {"batch_size": config.batch_size, "context_length": config.context_length}
    limit = topology.chip.hbm_bytes
    if "error" in made:
        return {"fits": False, **place, "hbm_limit_bytes": limit, **made}
    total, step_ms = sum(made["hbm_bytes"].values()), sum(made["step_ms_by_part"].values())
    tokens = config.batch_size * config.context_length
    return {
        "fits": total <= limit,
        **place,
        "hbm_total_bytes": total,
        "hbm_limit_bytes": limit,
        "headroom": 1 - total / limit,
        "step_ms": step_ms,
        "mfu": model_flops(config) / (step_ms / 1e3) / (chips * topology.chip.peak_flops),
        "tokens_per_second": tokens / (step_ms / 1e3),
        "run": run_facts(config, step_ms / 1e3, chips, made["state_bytes"]),
        **made,
    }


def changed(config: ConfigDict, change: Change) -> ConfigDict:
    """A copy of `config` with these fields set."""
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(change)
    return copy


def model_flops(config: ConfigDict) -> float:
    """FLOPs of the model in a step: 6 x parameters in matmuls x tokens, and 12 x layers x heads' width x N x N / 2 a
    sequence for causal attention; neither the selection nor what is recomputed counts.
    """
    length = config.context_length
    attention = 12 * _layers_times_width(config) * length**2 / 2
    return matmul_flops(config) + config.batch_size * attention


def matmul_flops(config: ConfigDict) -> float:
    """Of `model_flops`, what is not attention: forward and backward of the projections, SwiGLU and the logits."""
    model = model_config(config)
    counts = model.parameter_counts()
    parameters = counts["attention"] + counts["mlp"] + model.vocab_size * model.d_model
    return 6.0 * parameters * config.batch_size * config.context_length


def run_facts(config: ConfigDict, step_seconds: float, chips: int, state_bytes: int) -> dict[str, Any]:
    """The whole run: its length and cost in chips, its checkpoints and its data. Seconds are estimates."""
    tokens = config.batch_size * config.context_length * config.steps
    seconds = config.steps * step_seconds
    saves = config.checkpoint
    between = saves.every_steps * step_seconds
    if saves.every_minutes:
        between = min(between, saves.every_minutes * 60)
    forever = config.steps // saves.keep_every_steps if saves.keep_every_steps else 0
    kept = saves.keep_last + saves.keep_best + forever
    facts: dict[str, Any] = {
        "steps": config.steps,
        "tokens": tokens,
        "days": seconds / 86_400,
        "chip_hours": seconds / 3_600 * chips,
        "checkpoint_bytes": state_bytes,
        "checkpoint_every_seconds": between,
        "checkpoints_kept": kept,
        "checkpoints_kept_bytes": kept * state_bytes,
        "dataset_bytes_for_one_epoch": tokens * (2 if config.model.vocab_size <= 65_536 else 4),
    }
    dataset_tokens = _dataset_tokens(config.data.path)
    return facts | ({"dataset_tokens": dataset_tokens, "epochs": tokens / dataset_tokens} if dataset_tokens else {})


def _dataset_tokens(folder: str) -> int:
    """Of the training split, if the dataset is on this machine; else 0."""
    path = Path(folder, "manifest.json")
    if not folder or not path.exists():
        return 0
    try:
        return Manifest.from_json(path.read_text()).splits["train"].tokens
    except (DataError, KeyError) as error:
        raise ConfigError(f"--config.data.path={folder}: {error}") from error


def _layers_times_width(config: ConfigDict) -> int:
    model = model_config(config)
    return model.num_layers * model.num_heads * model.head_dim
