"""Every supported mesh computes what one device computes: see trainer/mesh.py for why that is no formality."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from trainer.batches import batch_sharding, rows_sharding
from trainer.errors import ConfigError
from trainer.hosts.requests import Request, request_array
from trainer.mesh import AXES, make_mesh, mesh_shape
from trainer.settings import read_settings
from trainer.state import init_state
from trainer.step import make_train_step

MESHES = {
    "data=8": (8, 1, 1, 1),
    "fsdp=8": (1, 8, 1, 1),
    "data=2,fsdp=4": (2, 4, 1, 1),
    "tensor=4": (1, 1, 1, 4),
    "data=2,fsdp=2,tensor=2": (2, 2, 1, 2),
    "fsdp=2,context=2,tensor=2": (1, 2, 2, 2),
    "data=2,fsdp=2,context=2": (2, 2, 2, 1),
}
SLOW = ("data=8", "fsdp=8", "data=2,fsdp=4", "tensor=4", "data=2,fsdp=2,context=2")  # each axis is in one of the others
STEPS = 20


def small_config(**changes) -> ConfigDict:
    c = base.get_config()
    c.context_length = 16
    c.model.num_layers = 2
    c.batch_size = 16
    c.steps = 100
    c.model.width = 4
    c.model.vocab_size = 512
    c.model.dtype = "float32"
    c.memory_loss.epsilon = 0.1
    c.mesh.data = 1
    c.optimizer.warmup_steps = 1000
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def on_mesh(config: ConfigDict, shape: tuple[int, ...]):
    config.mesh.update(dict(zip(AXES, shape, strict=True)))
    return make_mesh(config.mesh, jax.devices()[: math.prod(shape)])


def batches(config: ConfigDict, mesh, steps: int):
    """Random tokens, some of them padding."""
    rng = np.random.default_rng(0)
    sharding = batch_sharding(mesh)
    for _ in range(steps):
        inputs, targets = rng.integers(1, 512, (2, config.batch_size, config.context_length), dtype=np.int32)
        targets[-3:, 11:] = 0
        batch = {"inputs": jax.device_put(inputs, sharding), "targets": jax.device_put(targets, sharding)}
        yield batch | {"bytes": jax.device_put(np.ones(len(inputs), np.int32), rows_sharding(sharding))}


class Run(NamedTuple):
    losses: list[float]
    gradient: dict[str, np.ndarray]  # of the first step
    share: dict[str, float]  # of each matrix's bytes on its fullest device


@functools.cache
def run(shape: tuple[int, ...], steps: int = STEPS, accumulation: int = 1) -> Run:
    config = small_config(**{"optimizer.clip_norm": 0.0, "accumulation": accumulation})
    mesh = on_mesh(config, shape)
    with jax.set_mesh(mesh):
        settings = read_settings(config)
        state = jax.jit(lambda: init_state(settings))()
        step = jax.jit(make_train_step(settings, pad_id=0))
        share = {
            jax.tree_util.keystr(path): max(s.data.nbytes for s in x.addressable_shards) / x.nbytes
            for path, x in jax.tree_util.tree_leaves_with_path(state.params)
            if "norm" not in jax.tree_util.keystr(path)
        }
        losses, gradient = [], {}
        for batch in batches(config, mesh, steps):
            state, metrics = step(state, batch, request_array(mesh))
            losses.append(float(metrics["loss"]))
            if not gradient:  # Adam's first moment is a tenth of it
                (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s)]
                gradient = {
                    jax.tree_util.keystr(path): np.asarray(leaf, np.float64) / (1 - config.optimizer.b1)
                    for path, leaf in jax.tree_util.tree_leaves_with_path(adam.mu)
                }
    return Run(losses, gradient, share)


def _is_adam(node) -> bool:
    return hasattr(node, "mu")


def assert_same_gradient(gradient: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert gradient.keys() == expected.keys()
    for parameter, value in expected.items():
        error = np.linalg.norm(gradient[parameter] - value) / np.linalg.norm(value)
        assert error < 5e-5, f"gradient of {parameter}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MESHES]
)
def test_mesh_computes_what_one_device_does_and_shards_every_matrix(name):
    shape = MESHES[name]
    one_device, on_this_mesh = run((1, 1, 1, 1)), run(shape)
    assert_same_gradient(on_this_mesh.gradient, one_device.gradient)
    np.testing.assert_allclose(on_this_mesh.losses, one_device.losses, rtol=1e-4)
    # Every matrix has one dimension on fsdp and one on tensor.
    assert on_this_mesh.share == dict.fromkeys(on_this_mesh.share, 1 / (shape[1] * shape[3]))
    assert len(on_this_mesh.share) == 8


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    assert_same_gradient(run((2, 2, 1, 1), steps=1, accumulation=4).gradient, run((1, 1, 1, 1)).gradient)


@pytest.mark.parametrize(
    ("devices", "slices", "tensor", "shape"),
    [(64, 1, 1, (4, 16, 1, 1)), (4, 1, 1, (1, 4, 1, 1)), (8, 1, 2, (1, 4, 1, 2)), (8, 2, 1, (2, 4, 1, 1))],
)
def test_fsdp_takes_what_a_smaller_slice_has(devices, slices, tensor, shape):
    assert mesh_shape(base.Mesh(fsdp=16, tensor=tensor), devices, num_slices=slices) == shape


def test_fsdp_is_what_was_asked_for_where_data_is():
    with pytest.raises(ConfigError, match="data=1, fsdp=16, context=1, tensor=1 does not fit the 4 devices"):
        mesh_shape(base.Mesh(data=1, fsdp=16), 4)


def test_what_one_host_asks_for_reaches_all():
    config = small_config()
    mesh = on_mesh(config, (8, 1, 1, 1))
    with jax.set_mesh(mesh):
        settings = read_settings(config)
        state = jax.jit(lambda: init_state(settings))()
        step = jax.jit(make_train_step(settings, pad_id=0))
        (batch,) = batches(config, mesh, 1)
        rows = np.zeros((8, len(Request)), np.int32)
        assert step(state, batch, request_array(mesh, rows))[1]["requests"].tolist() == [0, 0, 0, 0]
        rows[5, Request.STOP] = rows[6, Request.SAVE_AGAIN] = 1
        assert step(state, batch, request_array(mesh, rows))[1]["requests"].tolist() == [1, 0, 1, 0]
