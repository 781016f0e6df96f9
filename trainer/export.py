"""Exports a run's newest checkpoint for other programs, in the format of `selective_attention.export_safetensors`.

    python -m trainer.export --workdir=DIR [--output=FOLDER]

By default into DIR/export/STEP, where a checkpoint that was exported before is left as it is. Prints the folder.
"""

import argparse
import dataclasses
import logging
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from selective_attention import Transformer, TransformerConfig, export_safetensors
from trainer.checkpoints.checksums import DamagedError, check_files, read_seal
from trainer.checkpoints.folder import checkpoint_folder, list_steps, load_state, read_metadata
from trainer.errors import ConfigError, ResumeError, StorageError
from trainer.settings import Settings, read_saved
from trainer.state import TrainState, init_state, model_graph

logger = logging.getLogger("trainer")


def load_model(workdir: str) -> tuple[Transformer, Settings, int]:
    """The model of a workdir's newest whole checkpoint, on this process's first device: (model, the run's settings,
    step). It is what its export would be: how the run's machines computed is left out. Changes nothing in the workdir.

    Raises:
      ResumeError: there is no checkpoint, none is whole, or it is not one of this trainer.
      OSError, StorageError: storage does not give one.
    """
    reasons = []
    for step in sorted(list_steps(checkpoint_folder(workdir)), reverse=True):
        folder = checkpoint_folder(workdir) / str(step)
        try:
            seal = read_seal(folder)
            if seal is not None:
                check_files(folder, seal)
            metadata = read_metadata(folder)
            settings = read_saved(metadata["config"])
            params = load_state(folder, metadata, _on_one_device(settings), sealed=seal is not None).params
        except DamagedError as error:
            logger.warning("checkpoint %d is damaged and was passed over: %s", step, error)
            reasons.append(f"{step}: {error}")
            continue
        return nnx.merge(model_graph(_on_any_machine(settings.transformer)), params), settings, step
    if reasons:
        raise ResumeError(f"no checkpoint in {workdir}/checkpoints is whole ({'; '.join(reasons)})")
    raise ResumeError(f"there is no checkpoint in {workdir}/checkpoints")


def _on_any_machine(config: TransformerConfig) -> TransformerConfig:
    machine = TransformerConfig.machine_fields()
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(config) if f.name in machine}
    return dataclasses.replace(config, **defaults)


def _on_one_device(settings: Settings) -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = jax.eval_shape(lambda: init_state(settings))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def export(workdir: str, output: str | None = None) -> Path:
    """Writes the model and returns its folder, which appears only when it is complete.

    Raises:
      ConfigError: the folder would be in a bucket.
      ResumeError: there is no checkpoint.
    """
    if "://" in (output or workdir):
        raise ConfigError(
            f"an export is written on this machine, not to {output or workdir}; give a folder with --output"
        )
    model, _, step = load_model(workdir)
    folder = Path(output) if output else Path(workdir) / "export" / str(step)
    if output is None and folder.exists():
        return folder
    if output is not None:
        export_safetensors(model, folder)
        return folder
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")  # tempfile would keep others from reading it
    try:
        export_safetensors(model, partial)
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():  # or another process was quicker
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--output")
    options = parser.parse_args()
    try:
        print(export(options.workdir, options.output))
    except (ConfigError, ResumeError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
