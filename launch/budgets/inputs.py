"""What the commands read, a model and windows of a dataset, and where they write."""

import tempfile
from pathlib import Path

import numpy as np
from etils import epath

from data import Dataset, EvalBatches
from inference_budget import Windows
from launch.commands import InputError
from selective_attention import Transformer, import_safetensors
from trainer.errors import ResumeError


def check_output(path: str | Path) -> None:
    """Tries whether a file can be written, before hours are spent on what shall be in it.

    Raises:
      InputError: it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"--output={path} is a folder; give a file in it")
    if not path.parent.is_dir():
        raise InputError(f"--output={path}: there is no folder {path.parent}; make it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--output={path} cannot be written: {error.strerror}; give another folder") from error


def load_model(path: str | Path) -> Transformer:
    """The model in `path`: an exported folder, or a training run's workdir, of which it is the newest checkpoint's.

    Nothing is written there.

    Raises:
      InputError: there is none.
    """
    folder = epath.Path(path)  # of a bucket, too
    try:
        if (folder / "config.json").exists():
            if "://" in str(path):
                raise InputError("an exported model is read from this machine; copy the folder here")
            return import_safetensors(path)
        if (folder / "checkpoints").is_dir():
            from trainer.export import load_model  # seconds, which an exported folder need not wait for

            return load_model(str(path))[0]
    except (ResumeError, OSError, ValueError, ImportError) as error:
        raise InputError(f"{path}: {error}") from error
    raise InputError(f"{path} holds no model: neither config.json nor a training run's checkpoints")


def located(path: str | Path) -> str:
    """A path that leads to the same place from any folder; addresses such as gs://bucket/run already do."""
    return str(path) if "://" in str(path) else str(Path(path).resolve())


def check_vocabulary(model: Transformer, vocab_size: int, source: object) -> None:
    """Raises InputError if the tokenizer of `source`, of so many tokens, has some that the model does not know."""
    if vocab_size > model.config.vocab_size:
        raise InputError(
            f"{source} has {vocab_size} different tokens, the model {model.config.vocab_size}; "
            "give the dataset that the model was trained on"
        )


def read_windows(dataset: Dataset, split: str, length: int, count: int) -> Windows:
    """`count` whole windows of `length` tokens (all, if there are fewer), spread evenly over a split.

    Raises:
      DataError: there is no such split, or a record that cannot be read.
      InputError: the split has no such windows.
    """
    record_length = dataset.manifest.record_length
    if record_length % length:
        raise InputError(
            f"a context of {length} tokens does not divide this dataset's records of {record_length}; give a divisor "
            "with --context"
        )
    whole = dataset.manifest.splits[dataset.check_split(split)].tokens // length  # the last may be padded
    if count < 1 or not whole:
        raise InputError(f"{count} of {whole} windows of {length} tokens in {split!r} are not enough")
    chosen = np.unique(np.linspace(0, whole - 1, min(count, whole)).astype(np.int64))
    rows = EvalBatches(dataset, context_length=length, batch_size=1, split=split).read(chosen)
    return Windows(rows["inputs"], rows["targets"])
