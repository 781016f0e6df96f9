"""A model as a folder that `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads.

The code that computes it, `trainer/huggingface/code`, goes with it and needs nothing of this repository.
"""

import importlib
import importlib.resources
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from inference_budget.interchange import model_fingerprint
from selective_attention import Transformer
from selective_attention.transformer.interchange import named_tensors
from trainer.errors import ConfigError
from trainer.huggingface.names import config_fields, theirs

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5_000_000_000
_CODE = ("configuration_selective_attention.py", "modeling_selective_attention.py")


def write_folder(
    model: Transformer,
    folder: Path,
    others: Mapping[str, bytes],
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the folder, which appears only when it is complete.

    Args:
      model: what is written.
      folder: where; new, or empty.
      others: what else shall be in it, by name: the tokenizer's files, generation_config.json, README.md.
      dtype: of the weights, float32 or bfloat16.
      shard_bytes: above so many bytes, weights go to a further file.

    Raises:
      ConfigError: the folder is not empty.
      OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty; give --output a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")  # tempfile would keep others from reading it
    partial.mkdir()
    try:
        (partial / "config.json").write_text(_json(_config(model, dtype)))
        code = importlib.resources.files("trainer.huggingface.code")
        for name in _CODE:
            (partial / name).write_text(code.joinpath(name).read_text())
        for name, content in others.items():
            (partial / name).write_bytes(content)
        _write_weights(model, partial, DTYPES[dtype], shard_bytes)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(model: Transformer, dtype: str) -> dict[str, object]:
    automatic = {
        "AutoConfig": "configuration_selective_attention.SelectiveAttentionConfig",
        "AutoModel": "modeling_selective_attention.SelectiveAttentionModel",
        "AutoModelForCausalLM": "modeling_selective_attention.SelectiveAttentionForCausalLM",
    }
    return {
        "architectures": ["SelectiveAttentionForCausalLM"],
        "model_type": "selective_attention",
        "auto_map": automatic,
        **config_fields(model.config),
        "dtype": dtype,
        "use_cache": True,
        "fingerprint": model_fingerprint(model),
    }


def _write_weights(model: Transformer, folder: Path, dtype: np.dtype, shard_bytes: int) -> None:
    save_file = importlib.import_module("safetensors.flax").save_file
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in named_tensors(model).items():
        cast = tensor.astype(dtype)
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + cast.nbytes > shard_bytes:
            shards.append({})
        shards[-1][theirs(name)] = cast
    width = len(shards)
    files = [f"model-{n:05}-of-{width:05}.safetensors" for n in range(1, width + 1)]
    files = ["model.safetensors"] if width == 1 else files
    for file, tensors in zip(files, shards, strict=True):
        save_file({n: jnp.asarray(x) for n, x in tensors.items()}, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets its owner alone read it
    if width > 1:
        where = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
        total = sum(x.nbytes for tensors in shards for x in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(_json(index))


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"
