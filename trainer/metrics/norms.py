"""Norms by layer and kind: where a run that goes wrong begins to."""

import collections

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from trainer.settings import Settings
from trainer.state import TrainState, last_update

_MLP = ("w_gate", "w_up", "w_down")


def norms_by_layer(tree: nnx.State) -> dict[str, Array]:
    """Euclidean norms, float32, of parameters or of what is laid out as they are, such as gradients: `attention`, `mlp`
    and `norms` [L], and of each parameter that belongs to no layer a scalar by its name.
    """
    squares: dict[str, list[Array]] = collections.defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        first, *rest = (entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        is_stacked = first == "blocks"
        axes = tuple(range(1 if is_stacked else 0, leaf.ndim))
        squares[_kind(rest[0]) if is_stacked else first].append(jnp.sum(jnp.square(leaf), axis=axes))
    return {kind: jnp.sqrt(sum(parts)) for kind, parts in squares.items()}


def state_norms(settings: Settings, state: TrainState) -> dict[str, dict[str, Array]]:
    """`norms_by_layer` of the last update and of the parameters: a program of its own, for the steps whose norms are
    wanted, since within each step it would cost half a percent.
    """
    return {"update": norms_by_layer(last_update(settings, state)), "parameter": norms_by_layer(state.params)}


def _kind(parameter: str) -> str:
    if parameter in _MLP:
        return "mlp"
    return "norms" if parameter.endswith("norm") else "attention"
