"""Model FLOPs utilisation, against a calculation by hand."""

import pytest

from configs import c4
from trainer.metrics.flops import PEAK_FLOPS, mfu, model_flops
from trainer.settings import read_settings


def test_flops_and_mfu_of_d12_are_those_of_a_calculation_by_hand():
    config = read_settings(c4.get_config("d12"))
    # 12 layers of four 768 x 768 and three 768 x 2,048 matrices, and 8,192 x 768 for the logits.
    in_matmuls = 12 * (2_359_296 + 4_718_592) + 6_291_456
    tokens = 256 * 512
    # q k^T and the sum over values: 2 x 2 x 768 x 512 x 512 / 2 FLOPs forward, twice that backward.
    attention = 256 * 12 * 3 * 402_653_184
    by_hand = 6 * in_matmuls * tokens + attention
    assert by_hand == pytest.approx(75.45e12, rel=1e-3)
    assert model_flops(config) == by_hand
    assert mfu(config, 0.05, 16, "TPU v4") == pytest.approx(by_hand / (0.05 * 16 * 275e12))


def test_a_device_whose_peak_is_not_known_has_none():
    assert "cpu" not in PEAK_FLOPS
