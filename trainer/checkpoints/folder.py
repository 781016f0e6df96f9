"""One checkpoint in storage: listed, read, verified, sealed, renamed; and which ones need not be kept."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from configs import base
from trainer.checkpoints.checksums import (
    DamagedError,
    Seal,
    checksums,
    list_files,
    read_seal,
    seal_path,
    write_seal,
)
from trainer.checkpoints.digest import digest
from trainer.checkpoints.disk import refused, root_cause
from trainer.errors import ResumeError, StorageError
from trainer.state import TrainState

_METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's
Metadata = dict[str, Any]  # what `Checkpoints.save` puts beside the arrays, as JSON has it


def checkpoint_folder(workdir: str) -> epath.Path:
    """Where the checkpoints are; absolute, because Orbax fails on relative paths, and only once it saves."""
    return epath.Path(workdir if "://" in workdir else os.path.abspath(workdir)) / "checkpoints"


def list_steps(folder: epath.Path) -> list[int]:
    """The steps of all checkpoints in `folder`, whole or not, in no order.

    Raises:
      OSError: storage does not say.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdecimal() and str(int(name)) == name]


def read_metadata(folder: epath.Path) -> Metadata:
    """What `Checkpoints.save` put beside the arrays: config, dataset_fingerprint, notes, loss, digest.

    Raises:
      DamagedError: it is not there, or is damaged.
      OSError: storage does not give it.
    """
    # Not by `ocp.metadata`, which opens every array, and keeps 0.5 MB each time: TensorStore's Spec.to_json leaks.
    try:
        metadata = json.loads((folder / _METADATA_FILE).read_text())["custom_metadata"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"its metadata cannot be read: {root_cause(error)}") from error
    if not isinstance(metadata, dict) or "digest" not in metadata:
        raise DamagedError(f"{folder} holds none of this trainer's metadata")
    return metadata


def load_state(folder: epath.Path, metadata: Metadata, abstract: TrainState, *, sealed: bool) -> TrainState:
    """The arrays, if they are those that were saved.

    Raises:
      DamagedError: they are not, or cannot be read though nothing says that the files are whole.
      ResumeError: they cannot be read though the files are whole.
      StorageError: storage does not give them.
    """
    try:
        state = ocp.load(folder, abstract)
    except Exception as error:
        if refused(error):
            raise StorageError(f"{folder} cannot be read: {root_cause(error)}") from error
        if not sealed:
            raise DamagedError(f"it cannot be read: {root_cause(error)}") from error
        raise ResumeError(f"{folder} does not fit this model: {root_cause(error)}") from error
    found = digest(state)
    changed = [name for name, value in found.items() if metadata["digest"].get(name) != value]
    if changed:
        raise DamagedError(f"the array {changed[0]} is not the one that was saved")
    return state


def seal_checkpoint(folder: epath.Path, loss: float | None) -> None:
    """Reads all files of a complete checkpoint and writes its seal."""
    write_seal(folder, Seal(loss, checksums(folder, list_files(folder))))


def loss_of(folder: epath.Path) -> float | None:
    """The validation loss in a checkpoint's seal, None if there is none."""
    try:
        seal = read_seal(folder)
    except DamagedError:
        return None
    return None if seal is None else seal.loss


def set_aside(folder: epath.Path, reason: str) -> str:
    """Renames a checkpoint, and its seal, so that nothing takes it for one; its new name."""
    names = [f"{folder.name}.{reason}"] + [f"{folder.name}.{reason}.{number}" for number in range(2, 1000)]
    free = next(path for path in (folder.parent / name for name in names) if not path.exists())
    folder.rename(free)
    if seal_path(folder).exists():
        seal_path(folder).rename(seal_path(free))
    return free.name


def expendable(losses: Mapping[int, float | None], config: base.Checkpoint) -> list[int]:
    """Which of these steps, by validation loss, need not be kept: neither among the last `keep_last`, nor a multiple of
    `keep_every_steps`, nor among the `keep_best` of lowest loss.
    """
    newest = sorted(losses)[-config.keep_last :]
    multiples = [step for step in losses if config.keep_every_steps and step % config.keep_every_steps == 0]
    known = {step: loss for step, loss in losses.items() if loss is not None}
    best = sorted(known, key=lambda step: (known[step], step))[: config.keep_best]
    return sorted(losses.keys() - {*newest, *multiples, *best})
