"""A run that begins with a model's parameters is that model, whether or not selection is switched on meanwhile."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention import Transformer, TransformerConfig, export_safetensors
from trainer.beginning import trained_values
from trainer.errors import ConfigError
from trainer.export import load_model
from trainer.loop import train
from trainer.settings import read_settings

SIZES = {"vocab_size": 300, "num_heads": 2, "head_dim": 32, "max_length": 32, "dtype": "float32"}
TOKENS_BN = np.random.default_rng(0).integers(0, 300, (2, 32), dtype=np.int32)


def make_model(**changes) -> Transformer:
    config = TransformerConfig.from_width(1, **{**SIZES, "attention": "reference", "selection": "off", **changes})
    return Transformer(config, rngs=nnx.Rngs(params=7))


def with_values(config: TransformerConfig, folder) -> Transformer:
    """The model of this config that a run with `--init_from=folder` begins with."""
    model = Transformer(config, rngs=nnx.Rngs(params=0))
    values = trained_values(config, str(folder))
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter[...] = jnp.asarray(values[path])
    return model


@pytest.mark.parametrize("qk_norm", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_own_head_begins_silent_and_its_gradient_is_that_of_one_that_selects(qk_norm, tmp_path):
    before = make_model(qk_norm=qk_norm)
    export_safetensors(before, tmp_path)
    config = dataclasses.replace(before.config, selection="own_head")
    model = with_values(config, tmp_path)
    tokens = jnp.asarray(TOKENS_BN)
    np.testing.assert_allclose(np.asarray(model(tokens)), np.asarray(before(tokens)), atol=1e-6)
    name = "query_sel_norm" if qk_norm else "w_query_sel"  # what is small
    assert 0 < np.abs(getattr(model.blocks, name)[...]).max() < 1e-18

    def loss(model):
        return jnp.mean(model(tokens) ** 2)

    small, gradient = (getattr(m.blocks, name)[...] for m in (model, nnx.grad(loss)(model)))
    direction, step, silent = small / jnp.max(jnp.abs(small)), 1e-2, loss(model)
    getattr(model.blocks, name)[...] = step * direction  # now it is heard
    expected = (loss(model) - silent) / step
    assert abs(float(expected)) > 1e-7
    np.testing.assert_allclose(float(jnp.sum(gradient * direction)), float(expected), rtol=0.1)


def test_the_paper_s_selection_begins_with_the_same_parameters_and_a_mask(tmp_path):
    before = make_model()
    export_safetensors(before, tmp_path)
    model = with_values(dataclasses.replace(before.config, selection="paper"), tmp_path)
    for (path, parameter), (_, other) in zip(
        *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, before)), strict=True
    ):
        np.testing.assert_array_equal(parameter[...], other[...], err_msg=str(path))
    assert float(jnp.max(model.selection_masks(jnp.asarray(TOKENS_BN)))) > 1


@pytest.mark.slow
def test_a_run_begins_there_and_needs_the_folder_no_more_when_it_is_resumed(tiny_config, tmp_path):
    before = make_model(num_heads=1, head_dim=64)
    export_safetensors(before, tmp_path / "model")
    tiny_config.update_from_flattened_dict({"steps": 2, "optimizer.peak_lr": 0.0, "model.selection": "own_head"})
    settings = read_settings(tiny_config)
    assert train(settings, str(tmp_path / "run"), init_from=str(tmp_path / "model")) == 0
    model = load_model(str(tmp_path / "run"))[0]
    for path, parameter in nnx.to_flat_state(nnx.state(before, nnx.Param)):
        found = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))[path]
        np.testing.assert_array_equal(found[...], parameter[...], err_msg=str(path))
    shutil.rmtree(tmp_path / "model")
    assert train(settings, str(tmp_path / "run"), init_from=str(tmp_path / "model")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 2}, "its num_heads is 1, but the config makes it 2"),
        ({"vocab_size": 299}, "its vocab_size is 300, but the config makes it 299"),
        ({"rotary_base": 5e5}, "its rotary_base is 10000.0, but the config makes it 500000.0"),
        ({"qk_norm": False}, "its qk_norm is True, but the config makes it False"),
    ],
)
def test_a_model_of_another_shape_is_refused(change, message, tmp_path):
    before = make_model(num_heads=1)
    export_safetensors(before, tmp_path)
    with pytest.raises(ConfigError, match=message):
        trained_values(dataclasses.replace(before.config, num_kv_heads=0, **change), str(tmp_path))


def test_folders_without_a_model_are_refused(tmp_path):
    config = make_model().config
    with pytest.raises(ConfigError, match=r"No such file.*; give a folder of `python -m trainer.export`"):
        trained_values(config, str(tmp_path))
    with pytest.raises(ConfigError, match="copy the folder here"):
        trained_values(config, "gs://bucket/model")
