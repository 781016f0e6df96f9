"""Exports a run's newest checkpoint for other programs.

    python -m trainer.export --workdir=DIR [--output=FOLDER]
    python -m trainer.export CHECKPOINT --format=hf -o FOLDER [--dtype=bfloat16] [--tokenizer=PATH]

The first has the format of `selective_attention.export_safetensors`, beside it the `tokenizer.model` of the run's
dataset if that is still there. By default it is in DIR/export/STEP, where a checkpoint that was exported before is left
as it is. The second is a folder for `transformers`; CHECKPOINT is a workdir, too, or a folder that the first command or
`trainer.import_hf` wrote. Both print the folder.
"""

import argparse
import dataclasses
import logging
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx

from data import DataError, open_dataset
from data.manifest import TOKENIZER_FILE
from selective_attention import Transformer, TransformerConfig, export_safetensors
from trainer.checkpoints.checksums import DamagedError, check_files, read_seal
from trainer.checkpoints.folder import checkpoint_folder, list_steps, load_state, read_metadata
from trainer.errors import ConfigError, ResumeError, StorageError
from trainer.settings import Settings, read_saved
from trainer.state import ARCHITECTURES, Model, TrainState, init_state, model_graph

logger = logging.getLogger("trainer")
M = TypeVar("M", bound=Model)


def load_model(workdir: str) -> tuple[Transformer, Settings, int]:
    """The decoder of a run, as `load`.

    Raises:
      ResumeError: also where the run trains an encoder-decoder.
    """
    return load(workdir, Transformer)


def load(workdir: str, kind: type[M]) -> tuple[M, Settings, int]:
    """The model of a workdir's newest whole checkpoint, on this process's first device: (model, the run's settings,
    step). It is what its export would be: how the run's machines computed is left out. Changes nothing in the workdir.

    Raises:
      ResumeError: there is no checkpoint, none is whole, it is not one of this trainer, or its model is no `kind`.
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
            _check_kind(workdir, settings, kind)
            params = load_state(folder, metadata, _on_one_device(settings), sealed=seal is not None).params
        except DamagedError as error:
            logger.warning("checkpoint %d is damaged and was passed over: %s", step, error)
            reasons.append(f"{step}: {error}")
            continue
        graph = model_graph(_on_any_machine(settings.transformer), settings.model.architecture)
        return nnx.merge(graph, params), settings, step
    if reasons:
        raise ResumeError(f"no checkpoint in {workdir}/checkpoints is whole ({'; '.join(reasons)})")
    raise ResumeError(f"there is no checkpoint in {workdir}/checkpoints")


def _check_kind(workdir: str, settings: Settings, kind: object) -> None:
    if ARCHITECTURES[settings.model.architecture] is kind:
        return
    if kind is Transformer:
        raise ResumeError(
            f"{workdir} trains an encoder-decoder, and this command takes decoders; see what it writes with "
            f"python -m launch.spans {workdir}"
        )
    raise ResumeError(f"{workdir} trains a decoder, which fills no blanks; give a run of configs/t5.py")


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
    model, settings, step = load_model(workdir)
    folder = Path(output) if output else Path(workdir) / "export" / str(step)
    if output is None and folder.exists():
        return folder
    if output is not None:
        export_safetensors(model, folder)
        _copy_tokenizer(workdir, settings, step, folder)
        return folder
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")  # tempfile would keep others from reading it
    try:
        export_safetensors(model, partial)
        _copy_tokenizer(workdir, settings, step, partial)
        os.rename(partial, folder)
    except OSError:
        if not folder.exists():  # or another process was quicker
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _copy_tokenizer(workdir: str, settings: Settings, step: int, folder: Path) -> None:
    """Lets `python -m inference_budget` take text, wherever the folder goes."""
    fingerprint = read_metadata(checkpoint_folder(workdir) / str(step))["dataset_fingerprint"]
    try:
        dataset = open_dataset(settings.data.path)
    except (OSError, DataError):  # it is not there any more
        return
    file = dataset.path / TOKENIZER_FILE
    if dataset.manifest.fingerprint == fingerprint and file.is_file():
        shutil.copyfile(file, folder / TOKENIZER_FILE)


def export_hugging_face(checkpoint: str, output: str, *, dtype: str = "float32", tokenizer: str | None = None) -> Path:
    """Writes a folder that `transformers` loads, and returns it; see `trainer.huggingface`.

    Raises:
      ConfigError: a folder that is not empty, or no tokenizer.
      ResumeError, ValueError: there is no model, or it cannot be read.
    """
    from trainer.huggingface.export import write_folder  # which need this module
    from trainer.huggingface.source import read_source

    if "://" in output:
        raise ConfigError(f"an export is written on this machine, not to {output}; give a folder with --output")
    source = read_source(checkpoint, tokenizer)
    write_folder(source.model, Path(output), source.files, dtype=dtype)
    return Path(output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a run's workdir; for --format=hf also an exported folder")
    parser.add_argument("--workdir", help="the same")
    parser.add_argument("-o", "--output", help="folder to write")
    parser.add_argument("--format", choices=("safetensors", "hf"), default="safetensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights, with --format=hf")
    parser.add_argument("--tokenizer", help="dataset, tokenizer.model or folder with a tokenizer.json, for --format=hf")
    options = parser.parse_args()
    checkpoint = options.checkpoint or options.workdir
    if checkpoint is None or (options.checkpoint and options.workdir):
        parser.error("give one checkpoint")
    if options.format == "hf" and not options.output:
        parser.error("--format=hf needs --output, a new folder")
    if options.format != "hf" and (options.dtype or options.tokenizer):
        parser.error("--dtype and --tokenizer belong to --format=hf")
    try:
        if options.format == "hf":
            dtype = options.dtype or "float32"
            print(export_hugging_face(checkpoint, options.output, dtype=dtype, tokenizer=options.tokenizer))
        else:
            print(export(checkpoint, options.output))
    except (ConfigError, ResumeError, StorageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
