"""No copy between hosts and devices in the loop that nobody meant."""

import contextlib

import jax
import numpy as np
import pytest

from trainer import saves
from trainer.hosts.requests import Request
from trainer.loop import train
from trainer.settings import read_settings


@pytest.fixture
def config(tiny_config):
    """Two steps with all that happens between steps."""
    fields = {"steps": 3, "checkpoint.every_steps": 2, "eval.every_steps": 2, "faults.check_replicas_every_steps": 2}
    tiny_config.update_from_flattened_dict(fields)
    return tiny_config


@pytest.fixture
def careless(monkeypatch):
    """A loop that leaves it to the step to copy the requests to the devices."""
    rows = np.zeros((len(jax.devices()), len(Request)), np.int32)
    monkeypatch.setattr(saves, "request_array", lambda mesh, asked: rows)


def test_a_copy_to_the_devices_that_nobody_asked_for_is_an_error(config, careless, tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(read_settings(config), str(tmp_path))


@pytest.mark.slow
def test_it_is_the_guard_that_finds_the_copy(config, careless, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "transfer_guard", lambda level: contextlib.nullcontext())
    assert train(read_settings(config), str(tmp_path)) == 0


def test_everything_else_that_the_loop_copies_is_marked(config, tmp_path):
    assert train(read_settings(config), str(tmp_path)) == 0
