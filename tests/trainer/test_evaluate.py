"""Evaluation on the way: what it sums up, and that it can be interrupted."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data import EvalBatches, open_dataset
from trainer.batches import batch_sharding
from trainer.evaluate import Evaluation, evaluate
from trainer.hosts.requests import Request, request_array
from trainer.loop import Run
from trainer.mesh import make_mesh
from trainer.settings import read_settings
from trainer.state import init_state
from trainer.step import make_eval_step


@pytest.mark.parametrize("stopped_at", [None, 2])
def test_evaluation_polls_for_an_interruption_with_every_batch(tiny_config, stopped_at):
    settings = read_settings(tiny_config)
    mesh = make_mesh(settings.mesh)
    source = EvalBatches(open_dataset(tiny_config.data.path), context_length=32, batch_size=16)
    asked: list[int] = []

    def requests() -> jax.Array:
        rows = np.zeros((mesh.size, len(Request)), np.int32)
        rows[-1, Request.STOP] = len(asked) == stopped_at  # of one host only
        asked.append(len(asked))
        return request_array(mesh, rows)

    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(settings).params)()
        step = jax.jit(make_eval_step(settings.transformer, pad_id=0))
        result = evaluate(step, params, source, 6, batch_sharding(mesh), requests)
    if stopped_at is None:
        rows = [source.rows(number, range(16))["targets"] for number in range(6)]
        assert len(asked) == 6 and result.tokens == np.count_nonzero(rows)
    else:
        assert result is None and len(asked) == stopped_at + 2  # the next batch is under way when this one is read


def test_perplexity_of_a_loss_beyond_what_exp_can_take_is_infinite():
    assert Evaluation(710.0, tokens=1, bytes=1).perplexity == math.inf
    assert Evaluation(0.0, tokens=1, bytes=1).perplexity == 1


def test_a_result_is_json_though_its_perplexity_is_infinite(tmp_path):
    job = SimpleNamespace(is_main=True, workdir=tmp_path)
    Run.write_result(SimpleNamespace(job=job, settings=SimpleNamespace(steps=1)), Evaluation(710.0, tokens=1, bytes=1))
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["perplexity"] is None and result["loss"] == 710.0
