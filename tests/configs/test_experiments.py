"""Every config of the paper's experiments builds, begins where it should, and differs from its baseline as it says."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs.experiments import CONFIGS, EXPERIMENTS, load, read_plans, step_key
from configs.list import describe
from launch.slices import find
from tests.support import ROOT
from trainer.batches import batch_sharding, global_batch
from trainer.checks import check_batch
from trainer.hosts.requests import Request, request_array
from trainer.mesh import AXES, make_mesh, mesh_shape
from trainer.settings import Settings, changed, read_settings
from trainer.source import open_source
from trainer.state import init_state
from trainer.step import make_eval_step, make_train_step

# The same model with one layer and short contexts, on this machine.
SHALLOW: dict[str, object] = {"model.num_layers": 1, "model.dtype": "float32", "model.attention": "reference"}
SHALLOW |= {"batch_size": 8, "mesh.data": 1, "mesh.fsdp": 8}


def shrunk(name: str, change: dict[str, object]) -> Settings:
    config = load(name)
    length = config.context_length if config.data.task else config.context_length // 32
    return changed(read_settings(config), SHALLOW | {"context_length": length} | change)


def tiny(name: str, **change: object) -> Settings:
    """Of width 1, and twice the heads where the config has that; the vocabulary is the test dataset's."""
    config = load(name)
    heads = {"model.num_heads": 2} if config.model.num_heads else {}
    vocabulary = {} if config.data.task else {"model.vocab_size": 304}
    return shrunk(name, {"model.width": 1} | heads | vocabulary | {k.replace("__", "."): v for k, v in change.items()})


def first_of_each(what, of=CONFIGS) -> list[str]:
    """The configs that differ in `what`; that of d8 is tried in every run, the others are slow."""
    names = {json.dumps(what(name), sort_keys=True): name for name in reversed(of)}
    marks = {"configs/c4.py:d8": []}
    return [pytest.param(name, marks=marks.get(name, pytest.mark.slow)) for name in reversed(names.values())]


def head_of(name: str) -> object:
    """What the loss at initialisation depends on where there is one layer."""
    model = load(name).model
    sizes = [model.width, model.num_heads, model.vocab_size, model.d_model]
    return [*sizes, model.selective, model.selection, model.architecture]


def tiny_of(name: str) -> object:
    settings = tiny(name)
    return [repr(settings.transformer), repr(settings.memory_loss), settings.lengths, settings.data.task]


def steps_of(settings: Settings, source, steps: int) -> tuple:
    """The state and the losses of so many steps from the start, on the eight devices."""
    mesh = make_mesh(settings.mesh)
    requests = request_array(mesh, np.zeros((mesh.size, len(Request)), np.int32))
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(settings))()
        train_step = jax.jit(make_train_step(settings, pad_id=0))
        for step in range(steps):
            state, metrics = train_step(state, global_batch(source, step, batch_sharding(mesh)), requests)
            losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


def first_loss(settings: Settings, source) -> float:
    """Of the first batch, by the parameters that training starts from."""
    mesh = make_mesh(settings.mesh)
    requests = request_array(mesh, np.zeros((mesh.size, len(Request)), np.int32))
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(settings).params)()
        batch = global_batch(source, 0, batch_sharding(mesh))
        sums = jax.jit(make_eval_step(settings.transformer, 0, architecture=settings.model.architecture))(
            params, batch, requests
        )
        return float(sums["nll"] / sums["tokens"])


class Random:
    """Rows of random tokens."""

    def __init__(self, settings: Settings):
        self.batch_size, self.context_length = settings.batch_size, settings.lengths["inputs"]
        self._encoder_length = settings.lengths.get("encoder_inputs", 0)
        self._vocab_size = settings.model.vocab_size

    def rows(self, step, rows):
        shape = (self.batch_size, self.context_length + 1)
        tokens = np.random.default_rng(step).integers(4, self._vocab_size, shape, dtype=np.int32)[list(rows)]
        tokens[:, 0] = 2
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "bytes": np.ones(len(tokens), np.int32)}
        if self._encoder_length:
            batch["encoder_inputs"] = np.resize(tokens[:, 1:], (len(tokens), self._encoder_length))
        return batch


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_and_its_mesh_fits_its_slice(name):
    settings = read_settings(load(name))
    chips = 1 if settings.data.task else find(settings.mesh.topology).num_chips
    check_batch(settings, dict(zip(AXES, mesh_shape(settings.mesh, chips), strict=True)))
    assert (settings.model.selective, settings.memory_loss.epsilon) == (
        "standard" not in name,
        0.1 * ("memory" in name),
    )


@pytest.mark.parametrize("name", first_of_each(head_of))
def test_the_loss_at_initialisation_is_that_of_a_guess(name):
    """ln(vocabulary), and half of the variance of the logits, which is 1: states have length sqrt(d_model) after the
    last norm, and embeddings are drawn with a standard deviation of 1 / sqrt(d_model).
    """
    settings = shrunk(name, {"batch_size": 64})
    source = open_source(settings).train if settings.data.task else Random(settings)
    loss = first_loss(settings, source)
    tolerance = 0.5 if settings.data.task else 0.15  # a task has too few token ids to speak of a variance
    assert loss == pytest.approx(math.log(settings.model.vocab_size) + 0.5, abs=tolerance)


PAIRED = [name for name in CONFIGS if f"{name},standard" in CONFIGS]


@pytest.mark.parametrize("name", first_of_each(tiny_of, PAIRED))
def test_by_seed_a_baseline_has_the_same_parameters_values_and_batches(name, dataset_path):
    path = "" if load(name).data.task else str(dataset_path)
    values, batches = {}, {}
    for variant in (name, f"{name},standard"):
        for seed in (0, 1):
            settings = tiny(variant, seed=seed, data__path=path)
            values[variant, seed] = jax.tree_util.tree_leaves_with_path(
                jax.jit(lambda s=settings: init_state(s).params)()
            )
            batches[variant, seed] = open_source(settings).train.rows(2, range(8))
    for seed in (0, 1):
        ours, baseline = values[name, seed], values[f"{name},standard", seed]
        assert [path for path, _ in ours] == [path for path, _ in baseline]
        for (_, a), (_, b) in zip(ours, baseline, strict=True):
            np.testing.assert_array_equal(a, b)
        for array, rows in batches[name, seed].items():
            np.testing.assert_array_equal(rows, batches[f"{name},standard", seed][array])
    assert not np.array_equal(batches[name, 0]["inputs"], batches[name, 1]["inputs"])
    assert any(not np.array_equal(a, b) for (_, a), (_, b) in zip(values[name, 0], values[name, 1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each(tiny_of))
def test_the_same_seed_repeats_to_the_bit(name):
    settings = tiny(name, optimizer__warmup_steps=1)
    source = open_source(settings).train if settings.data.task else Random(settings)
    (first, losses), (second, again) = (steps_of(settings, source, 3) for _ in range(2))
    assert losses == again and losses[0] != losses[-1]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_configs_of_one_step_share_their_plan_and_others_do_not():
    def key(name):
        return step_key(load(f"configs/{name}"))

    assert key("c4.py:d12") == key("c4.py:d12,lr0.01") == key("wikitext.py:d12") == key("lm1b.py:d12")
    others = ["d12", "d16", "d12,standard", "d12,memory", "d12,n512", "d12,vocab32k", "d12,leaky", "d12,own_head"]
    assert len({key(f"c4.py:{name}") for name in others}) == len(others)


def test_a_line_s_days_and_dollars_are_those_of_the_whole_run_and_none_are_made_up():
    plan = {"topology": "v4-32", "chips": 16, "fits": True, "headroom": 0.5, "step_ms": 100.0, "price": 2.0}
    plans = {step_key(load("configs/lm1b.py:d12")): plan | {"price_date": "today", "commit": "1"}}
    lines = describe("lm1b", plans).splitlines()
    days = 65_536 * 0.1 / 86_400
    assert lines[-2].split() == ["configs/lm1b.py:d12", "v4-32", "50%", f"{days:.2f}", f"{days * 24 * 16 * 2:,.0f}"]
    assert lines[-1].split() == ["configs/lm1b.py:d12,standard", "v4-32", "not", "planned"]
    assert max(map(len, lines)) <= 80


def test_figures_that_are_stored_belong_to_configs_that_there_are():
    keys = {step_key(load(name)) for name in CONFIGS}
    for key, plan in read_plans().items():
        assert key in keys and plan["chips"] == find(plan["topology"]).num_chips


def test_the_command_lists_every_config_and_names_an_experiment_that_is_not_there():
    command = [sys.executable, "-m", "configs.list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in CONFIGS)
    done = subprocess.run([*command, "sises"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        *(2, f"error: 'sises' is not an experiment; choose from {', '.join(EXPERIMENTS)}\n"),
    )
