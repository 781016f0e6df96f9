"""Curves: smoothed, thinned, subtracted."""

import dataclasses
import math

import numpy as np
import pytest

from launch.report.plot import Curve
from launch.report.run import Run
from trainer.metrics.json_lines import RunMetrics, Series


def curve(values, tokens_per_step=1):
    steps = np.arange(1, len(values) + 1)
    return Curve(steps, steps * tokens_per_step, steps / 3600, np.array(values, float))


def test_smoothing_is_a_mean_that_narrows_at_the_beginning_and_is_one_sided_at_the_end():
    values = np.random.default_rng(0).normal(size=250)
    smoothed = curve(values).smoothed().values
    for i in (0, 1, 4, 100, 247, 249):
        reach = min(5, i)
        assert smoothed[i] == pytest.approx(values[i - reach : i + reach + 1].mean())


def test_thinning_keeps_the_last_point_and_enough_others():
    thin = curve(np.zeros(10_001)).thinned()
    assert thin.steps[-1] == 10_001
    assert 600 <= len(thin.steps) <= 700
    assert curve([1.0]).thinned().values.tolist() == [1.0]
    assert curve([]).thinned().values.tolist() == [] == curve([]).smoothed().values.tolist()


def test_a_difference_is_taken_where_both_have_seen_as_many_tokens():
    small, large = curve([8, 7, 6, 5], tokens_per_step=50), curve([6.5, 4], tokens_per_step=100)
    difference = small.minus(large)
    assert difference.steps.tolist() == [2, 4]
    assert difference.values.tolist() == [0.5, 1.0]


def test_a_curve_leaves_out_what_is_not_finite_and_never_goes_back_in_time():
    losses = Series([1, 2, 3], [3.0, math.nan, 2.0], [3600.0, 7200.0, 3000.0])
    run = Run("mine", "mine", RunMetrics({"run/loss": losses}, {}, {}, []), "stopped", "", None, None, [])
    goodput = {"first_started_at": 0.0}
    found = Curve.of(dataclasses.replace(run, goodput=goodput), "run/loss")
    assert found.steps.tolist() == [1, 3] and found.values.tolist() == [3.0, 2.0]
    assert found.hours.tolist() == [1.0, 2.0]
    assert Curve.of(run, "no/such").steps.tolist() == []
