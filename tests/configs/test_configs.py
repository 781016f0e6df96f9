"""Configs hold the paper's values, and a mistake names what is right."""

import pytest

from configs import base, c4, demo
from trainer.settings import read_settings


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


def test_misspelt_field_is_an_error_that_names_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean"):
        base.get_config().optimizer.peek_lr = 1
