"""The statistics of F on TensorBoard are those of F, on every mesh."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from selective_attention import Transformer
from trainer.batches import batch_sharding
from trainer.mesh import AXES, make_mesh
from trainer.settings import read_settings
from trainer.state import init_state
from trainer.step import make_selection_step


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1, 1), marks=pytest.mark.slow), (1, 2, 2, 2)])
def test_statistics_on_a_mesh_are_those_of_the_mask(tiny_config, shape):
    tiny_config.update_from_flattened_dict({"model.num_heads": 2, "batch_size": 8, "mesh.data": 1})
    tiny_config.mesh.update(dict(zip(AXES, shape, strict=True)))
    tau = tiny_config.memory_loss.tau = 0.25
    settings = read_settings(tiny_config)
    mesh = make_mesh(settings.mesh, jax.devices()[: math.prod(shape)])
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(1, 300, (2, 8, 32), dtype=np.int32)
    targets[2, 20:] = 0
    targets[5] = 0
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(settings).params)()
        batch = {
            name: jax.device_put(x, batch_sharding(mesh)) for name, x in (("inputs", inputs), ("targets", targets))
        }
        statistics = jax.device_get(jax.jit(make_selection_step(settings.transformer, tau, pad_id=0))(params, batch))
    model = Transformer(settings.transformer, rngs=nnx.Rngs(params=0))
    nnx.update(model, jax.device_get(params))
    for layer, f_BNM in enumerate(np.asarray(model.selection_masks(inputs), np.float64)):
        rows = [(f[i, : i + 1], i) for f, t in zip(f_BNM, targets, strict=True) for i in np.flatnonzero(t)]
        pairs = np.concatenate([row for row, _ in rows])
        np.testing.assert_allclose(statistics["mean_f"][layer], pairs.mean(), rtol=1e-4)
        np.testing.assert_allclose(statistics["forgotten_fraction"][layer], (pairs > tau).mean(), rtol=1e-4)
        memory = [
            max(i + 1 - np.minimum(f[i], tau).sum() / tau for i in np.flatnonzero(t))
            for f, t in zip(f_BNM, targets, strict=True)
            if t.any()
        ]
        np.testing.assert_allclose(statistics["peak_memory"][layer], np.mean(memory), rtol=1e-4)
        lengths = [np.count_nonzero(t) for t in targets if t.any()]
        np.testing.assert_allclose(statistics["memory_loss"][layer], np.mean(np.divide(memory, lengths)), rtol=1e-4)
        np.testing.assert_allclose(statistics["text_f"][layer], f_BNM[0], rtol=1e-4, atol=1e-5)
