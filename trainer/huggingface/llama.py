"""Llama, Mistral and Qwen 3 as Hugging Face's transformers keeps them, read into our Transformer without selection.

A field of `config.json` that says something our Transformer cannot do is refused by its name, and so is one that is
not known here: nothing is passed over that might change what the model computes.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selective_attention import RotaryScaling, Selection, Transformer, TransformerConfig
from selective_attention.transformer.interchange import model_of_tensors
from trainer.errors import ConfigError
from trainer.huggingface.names import ours

MODELS = ("llama", "mistral", "qwen3")
_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_epsilon",
}
_READ = {"num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
# What these must say, if they are there: the only value that the Transformer has.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
}
# What says nothing about the function that the model computes.
_NO_MATTER = {
    *("architectures", "model_type", "auto_map", "_name_or_path", "transformers_version", "transformers.js_config"),
    *("torch_dtype", "dtype", "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("tokenizer_class", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "is_llama_config", "unsloth_version"),
    *("layer_types", "sliding_window", "max_window_layers"),  # which `_check` has looked at
}
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_SCALING = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_length",
    },
}
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def read_folder(folder: Path) -> Transformer:
    """The model in `folder`, with float32 parameters, on the default device.

    Raises:
      ConfigError: no such folder, or what it says cannot be represented; the message names the field or the tensor.
    """
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{folder / 'config.json'} holds no config")
    config = read_config(fields)
    tensors = _read_tensors(folder)
    if config.tied_embeddings:
        tensors.pop("output.weight", None)  # some files hold the embedding twice
    try:
        return model_of_tensors(config, tensors, str(folder))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """The Transformer of a `config.json`.

    Raises:
      ConfigError: something cannot be represented; the message names the field.
    """
    kind = fields.get("model_type")
    if kind not in MODELS:
        raise ConfigError(f"config.json: model_type is {kind!r}; only {', '.join(MODELS)} can be read")
    _check(fields)
    for name in (*_SIZES, *(("head_dim", "num_key_value_heads") if kind != "llama" else ())):
        if fields.get(name) is None and not (name == "head_dim" and kind == "mistral"):
            raise ConfigError(f"config.json lacks {name}")
    base, scaling = _rotary(fields)
    heads = fields["num_attention_heads"]
    try:
        return TransformerConfig(
            **{ours: fields[theirs] for theirs, ours in _SIZES.items()},
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
            rotary_base=base,
            rotary_scaling=scaling,
            selection=Selection.OFF,
            dtype="float32" if (fields.get("dtype") or fields.get("torch_dtype")) == "float32" else "bfloat16",
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.json: {error}") from error


def _check(fields: Mapping[str, Any]) -> None:
    for name, allowed in _ONLY.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"config.json: {name} is {fields[name]!r}; the Transformer has only {allowed[0]!r}")
    if set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(f"config.json: layer_types is {fields['layer_types']!r}; each must be full_attention")
    window = fields.get("sliding_window", 4096 if fields["model_type"] == "mistral" else None)  # its default there
    if window is not None and fields["model_type"] != "qwen3":  # which has use_sliding_window to say so
        raise ConfigError(f"config.json: sliding_window is {window!r}; the Transformer sees all tokens")
    for name in sorted(fields.keys() - _SIZES.keys() - _READ - _ONLY.keys() - _NO_MATTER):
        raise ConfigError(f"config.json: {name} is {fields[name]!r}, a field that is not known here")


def _rotary(fields: Mapping[str, Any]) -> tuple[float, RotaryScaling | None]:
    """The base of rotary positions, and how they are scaled; older configs have two fields for what is now one."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    base = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_SCALING:
        raise ConfigError(f"config.json: {name}.rope_type is {kind!r}; known are {', '.join(_ROPE_SCALING)}")
    needed = _ROPE_SCALING[kind]
    for key in sorted(rope.keys() - _ROPE - needed.keys()):
        raise ConfigError(f"config.json: {name}.{key} is {rope[key]!r}, which {kind!r} does not have here")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"config.json: {name}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, not 1")
    for key in sorted(needed.keys() - rope.keys()):
        raise ConfigError(f"config.json: {name} lacks {key}")
    if kind == "default":
        return float(base), None
    try:
        return float(base), RotaryScaling(kind, **{ours: rope[theirs] for theirs, ours in needed.items()})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.json: {name}: {error}") from error


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors by our names, as they are stored."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        load_file = importlib.import_module("safetensors.flax").load_file
        tensors = {name: np.asarray(x) for file in files for name, x in load_file(folder / file).items()}
    except FileNotFoundError as error:
        other = next((path.name for path in sorted(folder.glob("pytorch_model*.bin"))), None)
        hint = f"{other} is not read: save the model again as safetensors" if other else "there are no weights"
        raise ConfigError(f"{folder} has no {Path(str(error.filename or files[0])).name}; {hint}") from error
    except Exception as error:  # safetensors' own, a KeyError of the index
        raise ConfigError(f"the weights in {folder} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _FLOATS:
            raise ConfigError(f"{name} in {folder} is of type {tensor.dtype.name}; only {', '.join(_FLOATS)} are read")
    return {ours(name): x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
