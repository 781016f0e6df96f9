"""Whether a checkpoint belongs to this run: same dataset, same mathematics, same order of the data."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from configs import base
from trainer.errors import ConfigError, ResumeError
from trainer.settings import Settings, flat, free_fields, nearest


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a checkpoint says of its run."""

    settings: Settings
    dataset_fingerprint: str  # of the dataset's manifest

    def metadata(self) -> dict[str, object]:
        """{"config": the whole config, "dataset_fingerprint"}, for JSON."""
        return {"config": dataclasses.asdict(self.settings), "dataset_fingerprint": self.dataset_fingerprint}

    def check(self, step: int, saved: Mapping[str, Any], override: Iterable[str]) -> None:
        """Raises ResumeError unless checkpoint `step`, saved with this metadata, may be continued by this run.

        Fields that the config did not have when it was saved are at their defaults, which keep what was done then.
        """
        if saved["dataset_fingerprint"] != self.dataset_fingerprint:
            raise ResumeError(
                f"checkpoint {step} was trained on dataset {saved['dataset_fingerprint']}, but that of --config.data "
                f"is {self.dataset_fingerprint}; give the same dataset, or the same task, or another --workdir"
            )
        before, after = _DEFAULTS | flat(saved["config"]), flat(dataclasses.asdict(self.settings))
        may_differ = (*free_fields(), *override)
        changed = [
            name
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name) and not _is_part(name, may_differ)
        ]
        if changed:
            values = "; ".join(f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in changed)
            flags = " ".join(f"--override-resume={name}" for name in changed)
            raise ResumeError(
                f"checkpoint {step} was made with another config ({values}); restore these values, use another "
                f"--workdir, or go on with the new ones: {flags}"
            )


_DEFAULTS = flat(dataclasses.asdict(base.Config()))


def check_override(override: Iterable[str]) -> None:
    """Raises ConfigError unless each of `override` names a field, or a group of fields, that is compared."""
    names = _DEFAULTS.keys() | {name.rpartition(".")[0] for name in _DEFAULTS} - {""}
    for name in override:
        if name not in names:
            raise ConfigError(f"--override-resume={name}: the config has no such field{nearest(name, names)}")
        if _is_part(name, free_fields()):
            raise ConfigError(f"--override-resume={name}: this field may always differ; leave the flag out")


def _is_part(name: str, fields: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{field}.") for field in fields)
