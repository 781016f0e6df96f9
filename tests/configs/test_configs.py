"""Configs hold the paper's values, and a mistake names what is right."""

import dataclasses
import re

import pytest

from configs import base, c4, demo
from selective_attention import TransformerConfig
from trainer.errors import ConfigError
from trainer.settings import changed, free_fields, read_saved, read_settings


@pytest.mark.parametrize("width", c4.WIDTHS)
def test_c4_has_the_papers_hyperparameters_at_every_width(width):
    c = c4.get_config(f"d{width}")
    assert (c.model.width, c.context_length, c.batch_size, c.steps) == (width, 512, 256, 524_288)
    assert c.batch_size * c.context_length * c.steps == 68_719_476_736
    o = c.optimizer
    assert (o.peak_lr, o.warmup_steps, o.b1, o.b2) == (0.005, 1_000, 0.9, 0.999)


def test_context_size_family_trains_at_batch_128():
    assert {n: c4.get_config(f"d12,n{n}").batch_size for n in (512, 1024, 2048)} == {512: 128, 1024: 128, 2048: 128}


def test_twice_the_heads_are_twice_the_attention_parameters():
    one, two = (
        read_settings(c4.get_config(f"d12,standard{option}")).transformer.parameter_counts()
        for option in ("", ",heads2x")
    )
    assert two["attention"] == 2 * one["attention"] and two["mlp"] == one["mlp"]


def test_baseline_differs_from_the_selective_run_in_the_mask_alone():
    for module, variants in ((c4, ("d12", "d12,standard")), (demo, ("selective", "standard"))):
        ours, baseline = (module.get_config(variant) for variant in variants)
        assert ours.model.selective and not baseline.model.selective
        baseline.model.selective = True
        assert ours == baseline


@pytest.mark.parametrize("variant", ["d13", "12", "", "d12,fast", "d12,n4096"])
def test_unknown_variant_names_the_valid_ones(variant):
    with pytest.raises(ValueError, match="choose"):
        c4.get_config(variant)


def test_what_says_how_a_machine_computes_is_free_on_resume_and_in_no_export():
    free = {name.removeprefix("model.") for name in free_fields() if name.startswith("model.")}
    assert free == TransformerConfig.machine_fields() == {"attention", "remat", "scan_layers"}


def test_a_model_is_at_the_package_s_defaults_where_a_config_says_nothing():
    model = TransformerConfig.from_width(12, vocab_size=8192, max_length=512, scan_layers=False)
    assert read_settings(base.get_config()).transformer == model


def test_settings_are_the_config_and_a_copy_with_a_change():
    settings = read_settings(c4.get_config("d8,memory"))
    assert dataclasses.asdict(settings) == c4.get_config("d8,memory").to_dict()
    other = changed(settings, {"model.remat": "block", "optimizer.peak_lr": 1})
    assert (other.transformer.remat, other.optimizer.peak_lr, settings.model.remat) == ("block", 1.0, "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--config.steps must be positive, got 0"),
        ({"checkpoint.keep_best": -1}, "--config.checkpoint.keep_best must be 0 or more, got -1"),
        ({"model.widht": 3}, "--config has no key model.widht; did you mean width?"),
        ({"modl": {"width": 3}}, "--config has no key modl; did you mean model?"),
    ],
)
def test_a_value_that_no_run_can_have_is_named(change, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        changed(read_settings(base.get_config()), change)


@pytest.mark.parametrize("value", ["many", 1.5, True, None])
def test_a_value_of_another_type_is_named(value):
    with pytest.raises(ConfigError, match=f"^--config.steps must be a value of type int, got {value!r}$"):
        read_settings(base.get_config().to_dict() | {"steps": value})


def test_a_saved_config_of_another_version_is_read():
    config = base.get_config().to_dict()
    del config["model"]["scan_layers"], config["faults"]
    config["model"]["gone"] = config["no_longer"] = {"there": 1}
    assert read_saved(config) == read_settings(base.get_config())


def test_misspelt_field_is_an_error_that_names_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean"):
        base.get_config().optimizer.peek_lr = 1
