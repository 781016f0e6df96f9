"""Models as safetensors with a config.json, for other frameworks and back. Needs the extra `interchange`.

A folder holds `config.json`, the fields of `TransformerConfig`, and `model.safetensors` with float32 tensors. Matrices
are [out, in], as in `torch.nn.Linear`; heads are contiguous in the dimension that they share (head 0 selects).
RMSNorm adds `norm_epsilon` to the mean square; rotary positions turn the pairs (d, d + D / 2) of a head.

    embedding.weight [V, E]                  position_embedding.weight [max_length, E], if learned
    layers.0.attention.norm.weight [E]       layers.0.mlp.norm.weight [E]
    layers.0.attention.query.weight [H D, E] layers.0.mlp.gate.weight [F, E]
    layers.0.attention.key.weight [K D, E]   layers.0.mlp.up.weight [F, E]
    layers.0.attention.value.weight [K D, E] layers.0.mlp.down.weight [E, F]
    layers.0.attention.out.weight [E, H D]   final_norm.weight [E]
    output.weight [V, E], if not tied to the embedding
    layers.0.attention.{query,key}_norm.weight [D], with QK norm
    layers.0.attention.{query,key}_sel.weight [D, E] and, with QK norm, .{query,key}_sel_norm.weight [D], if the
        selecting head has its own projections

Shape letters: the package's.
"""

import dataclasses
import importlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from .config import TransformerConfig
from .transformer import Transformer

FORMAT = "selective_attention.Transformer/1"
CONFIG_FILE, MODEL_FILE = "config.json", "model.safetensors"
_MLP = ("mlp_norm", "w_gate", "w_up", "w_down")


def export_safetensors(model: Transformer, directory: str | Path) -> None:
    """Writes the model into `directory`, made if it does not exist; files of the same names are overwritten.

    Raises:
      ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    tensors = {name: jnp.asarray(tensor) for name, tensor in named_tensors(model).items()}
    machine = TransformerConfig.machine_fields()
    fields = {name: value for name, value in dataclasses.asdict(model.config).items() if name not in machine}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors, directory / MODEL_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps({"format": FORMAT} | fields, indent=2) + "\n")
    shutil.copymode(directory / CONFIG_FILE, directory / MODEL_FILE)  # safetensors lets its owner alone read it


def import_safetensors(directory: str | Path, **overrides: Any) -> Transformer:
    """The model in `directory`, on the default device.

    Args:
      directory: as `export_safetensors` leaves it; the tensors may have any floating-point type.
      **overrides: fields of `TransformerConfig` that leave the parameters as they are, such as `dtype` or `remat`.

    Raises:
      ImportError: safetensors is not installed.
      FileNotFoundError: no model there.
      ValueError: another format, a file that is damaged, or tensors that do not fit the config; the message names them.
    """
    config, tensors = read_safetensors(directory, **overrides)
    return model_of_tensors(config, tensors, str(Path(directory) / MODEL_FILE))


def read_safetensors(directory: str | Path, **overrides: Any) -> tuple[TransformerConfig, dict[str, ArrayLike]]:
    """What `import_safetensors` makes a model of: its config and its tensors. Arguments and errors are the same."""
    safetensors, directory = _safetensors(), Path(directory)
    try:
        fields = json.loads((directory / CONFIG_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE} is damaged ({error}); export the model again") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError(f"{directory / CONFIG_FILE} does not say that its format is {FORMAT!r}; it is another model's")
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := fields.keys() - known:
        raise ValueError(f"{directory / CONFIG_FILE} has unknown fields: {', '.join(sorted(unknown))}")
    try:
        config = TransformerConfig(**{**fields, **overrides})
    except TypeError as error:  # it lacks some, or a number is none
        raise ValueError(f"{directory / CONFIG_FILE} is damaged ({error}); export the model again") from error
    try:
        tensors = safetensors.load_file(directory / MODEL_FILE)
    except importlib.import_module("safetensors").SafetensorError as error:
        raise ValueError(f"{directory / MODEL_FILE} is damaged ({error}); export the model again") from error
    return config, tensors


def named_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The parameters as this module's documentation names and shapes them, float32."""
    tensors = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(jax.device_get(parameter[...]), np.float32)
        layers = value if path[0] == "blocks" else value[None]
        for name, layer in zip(_names(path, model.config), layers, strict=True):
            inner = _inner_axes(path)
            tensors[name] = layer.reshape(math.prod(layer.shape[:inner]), -1).T if inner else layer
    return tensors


def model_of_tensors(config: TransformerConfig, tensors: Mapping[str, ArrayLike], source: str) -> Transformer:
    """The model whose parameters `named_tensors` gives, on the default device.

    Raises:
      ValueError: tensors that do not fit the config; the message names them, and says that they are in `source`.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))
    values = parameter_values(config, tensors, source)
    loaded = [(path, x.replace(jnp.asarray(values[path]))) for path, x in nnx.to_flat_state(abstract)]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def parameter_values(
    config: TransformerConfig, tensors: Mapping[str, ArrayLike], source: str
) -> dict[tuple[Any, ...], np.ndarray]:
    """The parameters by their paths in the model's state, float32, as `model_of_tensors` takes them."""
    abstract = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))), nnx.Param)
    parameters = nnx.to_flat_state(abstract)
    names = {name for path, _ in parameters for name in _names(path, config)}
    if names != tensors.keys():
        missing, extra = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
        raise ValueError(f"{source} does not fit its config; missing: {missing}, unknown: {extra}")
    values = {}
    for path, parameter in parameters:
        in_layer = parameter.shape[1:] if path[0] == "blocks" else parameter.shape
        inner = _inner_axes(path)
        shape = (math.prod(in_layer[inner:]), math.prod(in_layer[:inner])) if inner else in_layer
        layers = []
        for name in _names(path, config):
            tensor = np.asarray(tensors[name])
            if tensor.shape != shape:
                raise ValueError(f"{name} in {source} is {tensor.shape}, but must be {shape}")
            layers.append((tensor.T if inner else tensor).reshape(in_layer))
        value = np.stack(layers) if path[0] == "blocks" else layers[0]
        values[path] = np.asarray(value, np.float32)
    return values


def _names(path: tuple[Any, ...], config: TransformerConfig) -> list[str]:
    """The tensors that hold a parameter, one for each layer if it is a block's."""
    if path[0] != "blocks":
        return [f"{path[0]}.weight"]
    name = path[1]
    part = "mlp" if name in _MLP else "attention"
    short = "norm" if name in ("mlp_norm", "attention_norm") else name.removeprefix("w_")
    return [f"layers.{layer}.{part}.{short}.weight" for layer in range(config.num_layers)]


def _inner_axes(path: tuple[Any, ...]) -> int:
    """How many leading axes of a layer's weight are summed over; 0 for what is no matrix of a linear map."""
    if path[0] != "blocks" or not path[1].startswith("w_"):
        return 0
    return 2 if path[1] == "w_out" else 1


def _safetensors() -> ModuleType:
    try:
        return importlib.import_module("safetensors.flax")
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'selective-attention[interchange]'") from error
