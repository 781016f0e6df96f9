"""Whether a checkpoint belongs to this run: same dataset, same mathematics, same order of the data."""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from trainer.errors import ConfigError, ResumeError

# Fields that a resumed run may change: none of them touches the mathematics or the order of the data.
FREE_FIELDS = (
    "data.path",
    "mesh",
    "checkpoint",
    "eval",
    "log_every_steps",
    "faults.check_replicas_every_steps",
    "faults.exit_seconds",
    "faults.peer_timeout_seconds",
    "faults.start_timeout_seconds",
    "faults.step_timeout_seconds",
    "faults.step_timeout_factor",
    "faults.first_step_timeout_seconds",
)


def check_override(override: Iterable[str], config: ConfigDict) -> None:
    """Raises ConfigError unless each of `override` names a field, or a group of fields, that is compared."""
    fields = _flat(config.to_dict()).keys()
    groups = {name.rpartition(".")[0] for name in fields} - {""}
    for name in override:
        if name not in fields | groups:
            nearest = difflib.get_close_matches(name, fields | groups, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"--override-resume={name}: the config has no such field{hint}")
        if _is_part(name, FREE_FIELDS):
            raise ConfigError(f"--override-resume={name}: this field may always differ; leave the flag out")


def check_identity(step: int, saved: dict[str, Any], now: dict[str, Any], override: Iterable[str]) -> None:
    """Raises ResumeError unless checkpoint `step`, saved by a run of identity `saved`, may be continued as `now`.

    An identity is {"config": the whole config, "dataset_fingerprint": of its manifest}, as JSON gives it back.
    """
    if saved["dataset_fingerprint"] != now["dataset_fingerprint"]:
        raise ResumeError(
            f"checkpoint {step} was trained on dataset {saved['dataset_fingerprint']}, but --config.data.path "
            f"holds {now['dataset_fingerprint']}; give the same dataset, or another --workdir"
        )
    before, after = _flat(saved["config"]), _flat(now["config"])
    changed = [
        name
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not _is_part(name, (*FREE_FIELDS, *override))
    ]
    if changed:
        values = "; ".join(f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in changed)
        flags = " ".join(f"--override-resume={name}" for name in changed)
        raise ResumeError(
            f"checkpoint {step} was made with another config ({values}); restore these values, use another --workdir, "
            f"or go on with the new ones: {flags}"
        )


def _is_part(name: str, fields: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{field}.") for field in fields)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
