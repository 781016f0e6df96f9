"""The state that a run begins with: parameters drawn anew, or those of a model that was trained before.

`--init_from` takes a folder that `trainer.export` or `trainer.import_hf` wrote. Selection may be switched on meanwhile.
With `--config.model.selection=paper` head 0 selects from the first step on, whatever it was trained to attend to. With
`own_head` the run begins as the model that it was given: the selecting head starts as a copy of head 0 whose queries
are multiplied by SILENT, so that F is there, and its gradient, but far below what a logit in float32 can tell apart.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from selective_attention import Selection, TransformerConfig
from selective_attention.transformer.interchange import parameter_values, read_safetensors
from trainer.errors import ConfigError
from trainer.settings import Settings
from trainer.state import TrainState, init_state

SILENT = 1e-20
# What a run may choose for itself; with rotary positions a context is no shape either.
_FREE = {"selection", "dtype"} | TransformerConfig.machine_fields()


def first_state(settings: Settings, init_from: str = "") -> TrainState:
    """The state of step 0 on the mesh that is set, with the parameters of the model in the folder `init_from`, if any.

    Raises:
      ConfigError: there is no model in the folder, or it is not of the config's shape; the message names the fields.
    """
    state = jax.jit(lambda: init_state(settings))()
    if not init_from:
        return state
    if settings.corruption is not None:
        raise ConfigError(
            f"--init_from={init_from}: what is exported is a decoder, and this run trains an encoder-decoder; "
            "leave the flag out"
        )
    values = trained_values(settings.transformer, init_from)

    def placed(path: tuple[Any, ...], parameter: nnx.Param) -> nnx.Variable:
        value, like = values[path], parameter[...]
        return parameter.replace(jax.make_array_from_callback(like.shape, like.sharding, lambda part: value[part]))

    params = [(path, placed(path, parameter)) for path, parameter in nnx.to_flat_state(state.params)]
    return state._replace(params=nnx.from_flat_state(params))


def trained_values(config: TransformerConfig, folder: str) -> dict[tuple[Any, ...], np.ndarray]:
    """The parameters that the model in `folder` gives a Transformer of this config, float32, by their paths.

    Raises:
      ConfigError: as `first_state`.
    """
    if "://" in folder:
        raise ConfigError(f"--init_from={folder}: an exported model is read from this machine; copy the folder here")
    try:
        before, tensors = read_safetensors(folder)
        values = parameter_values(before, tensors, folder)
    except (OSError, ValueError) as error:
        hint = "; give a folder of `python -m trainer.export`" if not (Path(folder) / "config.json").exists() else ""
        raise ConfigError(f"--init_from={folder}: {error}{hint}") from error
    free = _FREE | ({"max_length"} if config.positions == "rotary" else set())
    for field in dataclasses.fields(TransformerConfig):
        found, wanted = getattr(before, field.name), getattr(config, field.name)
        if field.name not in free and found != wanted:
            raise ConfigError(
                f"--init_from={folder}: its {field.name} is {found}, but the config makes it {wanted}; "
                f"--config=configs/uptrain.py:{folder} takes the shape from there"
            )
    if config.selection is Selection.OWN_HEAD and before.selection is not Selection.OWN_HEAD:
        values |= _silent_head(values, config.qk_norm)
    kept = {path for path in values if not path[-1].endswith("_sel") and not path[-1].endswith("_sel_norm")}
    return values if config.selection is Selection.OWN_HEAD else {path: values[path] for path in kept}


def _silent_head(values: dict[tuple[Any, ...], np.ndarray], qk_norm: bool) -> dict[tuple[Any, ...], np.ndarray]:
    """The selecting head's parameters. With QK norm its queries' scale makes them small, else their projection."""
    head = {}
    for name in ("query", "key"):
        scale = np.float32(SILENT if name == "query" else 1)
        head["blocks", f"w_{name}_sel"] = values["blocks", f"w_{name}"][:, :, 0] * (1 if qk_norm else scale)
        if qk_norm:
            head["blocks", f"{name}_sel_norm"] = values["blocks", f"{name}_norm"] * scale
    return head
