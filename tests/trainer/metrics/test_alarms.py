"""What a person is told of: once when it begins, and as a scalar while it lasts."""

import time

import numpy as np
import pytest

from trainer.goodput import Goodput
from trainer.metrics.alarms import Alarms
from trainer.metrics.writer import MetricsWriter


class Written(MetricsWriter):
    def __init__(self):
        self.points = []

    def write(self, step, scalars):
        self.points += [(step, name, value) for name, value in scalars.items()]


@pytest.fixture
def written():
    return Written()


@pytest.fixture
def alarms(written):
    return Alarms(written)


def step(loss, bad_steps=0.0):
    return {"loss": loss, "bad_steps": bad_steps, "grad_norm": 1.0}


def test_a_spike_of_the_loss_is_named_with_its_deviations(alarms, written, caplog):
    rng = np.random.default_rng(0)
    for number in range(1, 201):
        assert not alarms.after_step(number, step(3 + 0.01 * rng.normal()))
    assert alarms.after_step(201, step(3.2))
    ((number, name, z),) = written.points
    assert (number, name) == (201, "warning/loss_spike_z") and 15 < z < 25
    assert "step 201: the loss 3.2000 is" in caplog.text


def test_a_skipped_update_is_trouble_and_counted(alarms, written):
    assert alarms.after_step(1, step(float("nan"), bad_steps=1.0))
    assert alarms.after_step(2, step(float("nan"), bad_steps=2.0))
    assert written.points == [(1, "warning/skipped_updates", 1), (2, "warning/skipped_updates", 2)]


def test_waiting_for_data_is_said_once_while_it_lasts(alarms, written, caplog, tmp_path):
    goodput = Goodput(str(tmp_path), time.monotonic(), True)
    for number, wait in ((100, 0.02), (200, 0.03), (300, 0.001), (400, 0.02)):
        alarms.look(number, wait, 0.1, goodput)
    assert [number for number, name, _ in written.points if name == "warning/data_bound"] == [100, 200, 400]
    assert caplog.text.count("waiting for data") == 2


def test_a_slow_host_is_named(alarms, written, caplog):
    alarms._compare_hosts(100, {0: 0.01, 1: 0.012, 2: 0.05, 3: 0.011}, step_seconds=0.1)
    assert (100, "warning/slow_host", 2.0) in written.points
    assert "host 2 itself takes 0.050 s of a step of 0.100 s, the others 0.011 s" in caplog.text


def test_hosts_that_are_alike_are_none(alarms, written):
    alarms._compare_hosts(100, {0: 0.01, 1: 0.015}, step_seconds=0.1)
    assert not [name for _, name, _ in written.points if name.startswith("warning/")]
