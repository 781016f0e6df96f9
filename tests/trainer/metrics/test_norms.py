"""Norms by layer and kind are those of the arrays, on a mesh as well."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from data import TrainBatches, open_dataset
from trainer.batches import batch_sharding, global_batch
from trainer.hosts.requests import request_array
from trainer.mesh import make_mesh
from trainer.metrics.norms import state_norms
from trainer.metrics.steps import norm_scalars
from trainer.settings import read_settings
from trainer.state import init_state
from trainer.step import make_train_step

KINDS = {"attention": ["w_query", "w_key", "w_value", "w_out"], "mlp": ["w_gate", "w_up", "w_down"]}
KINDS["norms"] = ["attention_norm", "mlp_norm", "query_norm", "key_norm"]


def directly(tree):
    """In float64, by the parameters' names."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        arrays[[entry.key for entry in path if hasattr(entry, "key")][-1]] = np.asarray(leaf, np.float64)
    layers = {
        kind: np.sqrt(sum((arrays[name] ** 2).reshape(2, -1).sum(axis=1) for name in names))
        for kind, names in KINDS.items()
    }
    return layers | {name: np.linalg.norm(arrays[name]) for name in ("embedding", "final_norm")}


def test_norms_of_a_step_are_those_of_gradient_update_and_parameters(tiny_config):
    fields = {"model.num_layers": 2, "optimizer.clip_norm": 0.0, "optimizer.warmup_steps": 0, "mesh.data": 4}
    tiny_config.update_from_flattened_dict(fields)
    settings = read_settings(tiny_config)
    mesh = make_mesh(settings.mesh)
    source = TrainBatches(open_dataset(tiny_config.data.path), context_length=32, batch_size=16, seed=0)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(settings))()
        batch = global_batch(source, 0, batch_sharding(mesh))
        step = jax.jit(make_train_step(settings, pad_id=0))
        after, metrics = step(state, batch, request_array(mesh))
        norms = jax.device_get(metrics["norms"] | jax.jit(functools.partial(state_norms, settings))(after))
    (adam,) = (x for x in jax.tree.leaves(after.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    expected = {
        "gradient": directly(jax.tree.map(lambda mu: mu / (1 - settings.optimizer.b1), adam.mu)),
        "update": directly(jax.tree.map(jnp.subtract, after.params, state.params)),
        "parameter": directly(after.params),
    }
    for name, by_kind in expected.items():
        assert norms[name].keys() == by_kind.keys()
        for kind, value in by_kind.items():
            np.testing.assert_allclose(norms[name][kind], value, rtol=1e-3, err_msg=f"{name} of {kind}")
    total = np.sqrt(sum(np.sum(np.square(value)) for value in norms["gradient"].values()))
    np.testing.assert_allclose(metrics["grad_norm"], total, rtol=1e-5)
    scalars = norm_scalars(norms)
    ratio = expected["update"]["mlp"][1] / expected["parameter"]["mlp"][1]
    np.testing.assert_allclose(scalars["weights_update_ratio/layer_01_mlp"], ratio, rtol=1e-3)
