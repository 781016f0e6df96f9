"""What the commands read: a model, and windows of a dataset.

This package knows neither the trainer nor its data pipeline, which may import it. So it reads what they document: a
model in the format of `selective_attention.export_safetensors`, and a dataset's manifest.json beside its ArrayRecord
shards. A training run's workdir is exported first, by the trainer itself, in a process of its own.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from inference_budget.perplexity import Windows
from selective_attention import Transformer, import_safetensors

EXECUTION = ("remat", "scan_layers", "attention")  # fields of a config that say how to compute, not what


class InputError(ValueError):
    """A file or an option that cannot be used; the message says which and what to do."""


def load_model(path: str | Path) -> Transformer:
    """The model in `path`: an exported folder, or a training run's workdir.

    Raises:
      InputError: there is none.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        if not (path / "checkpoints").is_dir():
            raise InputError(f"{path} holds no model: neither config.json nor a training run's checkpoints")
        command = [sys.executable, "-m", "trainer.export", f"--workdir={path}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "rror" in line] or ["see " + " ".join(command)]
            raise InputError(f"{path} could not be exported: {said[-1]}")
        path = Path(done.stdout.strip().splitlines()[-1])
    try:
        return import_safetensors(path)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path}: {error}") from error


def model_fingerprint(model: Transformer) -> str:
    """The SHA-256 of every parameter and of what the config says of the function that they make.

    Fields at their defaults are left out, so that a field that a later version adds changes nothing.
    """
    config = {
        field.name: str(getattr(model.config, field.name))
        for field in dataclasses.fields(model.config)
        if field.name not in EXECUTION and getattr(model.config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        digest.update(repr(name).encode() + np.asarray(jax.device_get(parameter[...])).tobytes())
    return digest.hexdigest()


class Data:
    """A dataset folder.

    Raises:
      InputError: it is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._readers = Path(path), dict[str, Any]()
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
            self.fingerprint: str = self.manifest["fingerprint"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.path} is no dataset: manifest.json cannot be read ({error})") from error

    @property
    def bos_id(self) -> int:
        return self.manifest["tokenizer"]["bos_id"]

    @property
    def eos_id(self) -> int:
        return self.manifest["tokenizer"]["eos_id"]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """SentencePiece's processor."""
        return _optional("sentencepiece").SentencePieceProcessor(model_file=str(self.path / "tokenizer.model"))

    def windows(self, split: str, length: int, count: int) -> Windows:
        """`count` whole windows of `length` tokens (all, if there are fewer), spread evenly over a split."""
        splits, record_length = self.manifest["splits"], self.manifest["record_length"]
        if split not in splits:
            raise InputError(f"{self.path} has no split {split!r}; it has {', '.join(splits)}")
        if record_length % length:
            raise InputError(f"a context of {length} tokens does not divide this dataset's records of {record_length}")
        total = splits[split]["tokens"] // length
        if count < 1 or not total:
            raise InputError(f"{count} of {total} windows of {length} tokens in {split!r} are not enough")
        chosen = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
        records, place = np.divmod(chosen * length, record_length)
        tokens = np.stack([self._record(split, int(r))[p : p + length] for r, p in zip(records, place, strict=True)])
        targets = tokens.astype(np.int32)
        bos = np.full((len(targets), 1), self.bos_id, np.int32)
        return Windows(np.concatenate([bos, targets[:, :-1]], axis=1), targets)

    def _record(self, split: str, number: int) -> np.ndarray:
        for shard in self.manifest["splits"][split]["shards"]:
            if number < shard["records"]:
                record = self._reader(shard["file"]).read([number])[0]
                return np.frombuffer(record, self.manifest["record_dtype"])
            number -= shard["records"]
        raise InputError(f"{self.path} has fewer records in {split!r} than manifest.json says")

    def _reader(self, file: str) -> Any:
        if file in self._readers:
            return self._readers[file]
        reader = _optional("array_record.python.array_record_module").ArrayRecordReader(str(self.path / file))
        if not reader.ok():
            raise InputError(f"{self.path / file} cannot be read")
        self._readers[file] = reader
        return reader


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} is missing: run make setup") from error
