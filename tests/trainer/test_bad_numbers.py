"""Updates with bad numbers are skipped, a row of them rolls the run back, and replicas that differ are found."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data import TrainBatches, open_dataset
from tests.support import ROOT
from tests.support.runs import TINY
from trainer.batches import RemainingBatches, batch_sharding, rows_sharding
from trainer.checkpoints.manager import Checkpoints
from trainer.errors import EXIT_CORRUPT, EXIT_DIVERGED, EXIT_PEER_LOST, ReplicaError
from trainer.hosts.replicas import make_replica_check
from trainer.hosts.requests import request_array
from trainer.mesh import make_mesh
from trainer.settings import read_settings
from trainer.state import init_state
from trainer.step import make_train_step


class Steps:
    """A train step on eight devices."""

    def __init__(self, config) -> None:
        self.mesh = make_mesh(config.mesh)
        self.config = config
        settings = read_settings(config)
        with jax.set_mesh(self.mesh):
            self.state = jax.jit(lambda: init_state(settings))()
            self._step = jax.jit(make_train_step(settings, pad_id=0))
        self._requests = request_array(self.mesh)

    def __call__(self, state, seed: int):
        rng = np.random.default_rng(seed)
        shape = (2, self.config.batch_size, self.config.context_length)
        inputs, targets = rng.integers(1, 300, shape, dtype=np.int32)
        batch = {
            name: jax.device_put(x, batch_sharding(self.mesh)) for name, x in (("inputs", inputs), ("targets", targets))
        }
        batch["bytes"] = jax.device_put(np.ones(len(inputs), np.int32), rows_sharding(batch_sharding(self.mesh)))
        with jax.set_mesh(self.mesh):
            return self._step(state, batch, self._requests)


def poison(state):
    """Embeddings of which one number is NaN."""
    leaves, tree = jax.tree.flatten(state.params)
    host = np.array(leaves[0])
    host.flat[0] = np.nan
    leaves[0] = jax.device_put(host, leaves[0].sharding)
    return state._replace(params=jax.tree.unflatten(tree, leaves))


def test_an_update_that_is_not_finite_changes_nothing_but_the_counters(tiny_config):
    steps = Steps(tiny_config)
    state, metrics = steps(steps.state, 0)
    assert int(metrics["bad_steps"]) == 0
    bad = poison(state)
    after, metrics = steps(bad, 1)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.health.bad_steps), int(metrics["bad_steps"])) == (2, 1, 1)
    for old, new in zip(
        jax.tree.leaves((bad.params, bad.opt_state)), jax.tree.leaves((after.params, after.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    healed = after._replace(params=state.params)
    after, metrics = steps(healed, 1)
    assert int(metrics["bad_steps"]) == 0
    expected, _ = steps(state, 1)  # as if the bad one had not been
    for old, new in zip(jax.tree.leaves(expected.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_a_spike_of_the_loss_is_skipped_where_the_rule_is_on(tiny_config):
    tiny_config.faults.spike_factor = 1.5
    steps = Steps(tiny_config)
    state, metrics = steps(steps.state, 0)
    usual = state._replace(health=state.health._replace(mean_loss=metrics["loss"] / 1.4))
    spike = state._replace(health=state.health._replace(mean_loss=metrics["loss"] / 1.6))
    assert int(steps(usual, 1)[1]["bad_steps"]) == 0
    assert int(steps(spike, 1)[1]["bad_steps"]) == 1


def test_skipped_windows_leave_out_these_batches_and_no_others():
    class Source:
        batch_size, context_length = 1, 1

        def rows(self, step, rows):
            return {"inputs": np.full((1, 1), step)}

    remaining = RemainingBatches(Source(), [(7, 9), (3, 5)])
    read = [int(remaining.rows(step, range(1))["inputs"][0, 0]) for step in range(8)]
    assert read == [0, 1, 2, 5, 6, 9, 10, 11]


@pytest.fixture
def rare_token(tiny_config):
    """A token of few batches, and the first of these: (token, batch)."""
    dataset = open_dataset(tiny_config.data.path)
    source = TrainBatches(dataset, context_length=32, batch_size=16, seed=tiny_config.seed)
    seen = [set(np.unique(source.rows(step, range(16))["inputs"])) for step in range(30)]
    for token in range(300):
        batches = [step for step, tokens in enumerate(seen) if token in tokens]
        if batches and batches[0] >= 7 and len(batches) == 1:
            return token, batches[0]
    pytest.fail("every token of this dataset is in many batches")


def poisoned_run(config, workdir, tokens) -> None:
    """A checkpoint of step 0 in which these tokens' input embeddings are NaN."""
    settings = read_settings(config)
    mesh = make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(settings))()
        leaf = nnx.to_pure_dict(state.params)["embedding"]
        host = np.array(leaf)
        host[list(tokens)] = np.nan
        poisoned = jax.device_put(host, leaf.sharding)
        state = state._replace(params=jax.tree.map(lambda x: poisoned if x is leaf else x, state.params))
        assert sum(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(state.params)) == 1
        checkpoints = Checkpoints(str(workdir), settings, open_dataset(config.data.path).manifest.fingerprint)
        checkpoints.save(0, state, {"last_eval_step": -1, "skipped_batches": []}, None)
        checkpoints.wait()
        checkpoints.close()


def test_a_bad_batch_is_rolled_back_over_and_left_out(start_trainer, finish, tiny_config, rare_token, tmp_path):
    token, batch = rare_token
    tiny_config.update_from_flattened_dict({"model.tied_embeddings": False, "faults.max_bad_steps": 1, "steps": 25})
    poisoned_run(tiny_config, tmp_path, [token])
    fields = {"model__tied_embeddings": False, "faults__max_bad_steps": 1, "steps": 25}
    code, output = finish(start_trainer(tmp_path, eval__every_steps=1000, **fields))
    back = batch - batch % 5  # checkpoints are made every 5 steps
    assert f"steps {batch + 1} to {batch + 1}, batches {batch} to {batch} of the data order" in output, output
    assert f"back to step {back}, without these batches" in output
    assert code == 0, output


@pytest.mark.slow
def test_bad_numbers_right_after_a_rollback_stop_the_run(start_trainer, finish, tiny_config, tmp_path):
    fields = {"model__tied_embeddings": False, "faults__max_bad_steps": 2}
    tiny_config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    poisoned_run(tiny_config, tmp_path, range(300))
    code, output = finish(start_trainer(tmp_path, **fields))
    assert code == EXIT_DIVERGED, output
    assert "batches 0 to 1 of the data order" in output  # the first time
    assert "batches 2 to 3 of the data order, although the run had just been rolled back to step 0" in output


def test_a_replica_that_differs_is_found_and_named(tiny_config):
    tiny_config.update_from_flattened_dict({"mesh.data": 4, "mesh.fsdp": 2})
    mesh = make_mesh(tiny_config.mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(read_settings(tiny_config)).params)()
    check = make_replica_check(params, mesh)
    check(params, 7)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        shards = [np.array(shard.data) for shard in leaf.addressable_shards]
        shards[5].view(np.uint32).flat[-1] ^= 1 << 3
        pieces = [jax.device_put(x, s.device) for x, s in zip(shards, leaf.addressable_shards, strict=True)]
        flipped = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)
        device = leaf.addressable_shards[5].device
        corrupt = jax.tree.map(lambda x, leaf=leaf, flipped=flipped: flipped if x is leaf else x, params)
        with pytest.raises(ReplicaError) as error:
            check(corrupt, 7)
        assert f"{device} of host 0 differs" in str(error.value)
        assert jax.tree_util.keystr(path) in str(error.value)


def test_a_step_that_hangs_prints_all_stacks_and_ends_the_process():
    program = (
        "import time; from trainer.hosts.watchdog import Watchdog\n"
        "dog = Watchdog(least_seconds=0.5, factor=2, first_seconds=60)\n"
        "for _ in range(3):\n"
        "    with dog.watch('a step'): time.sleep(0.01)\n"
        "def hangs(): time.sleep(120)\n"
        "with dog.watch('a step'): hangs()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_PEER_LOST
    assert "a step has taken" in done.stderr and "in hangs" in done.stderr


FLIPS_A_BIT = """
import runpy, sys
import jax, numpy as np
from trainer import loop

real = loop.make_replica_check
def make(params, mesh):
    check = real(params, mesh)
    def flipped(params, step):
        (leaf, *others), structure = jax.tree.flatten(params)
        with jax.transfer_guard("allow"):
            shards = [np.array(shard.data) for shard in leaf.addressable_shards]
            shards[5].view(np.uint32).flat[0] ^= 1
            pieces = [jax.device_put(x, s.device) for x, s in zip(shards, leaf.addressable_shards)]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)
        check(jax.tree.unflatten(structure, [leaf, *others]), step)
    return flipped
loop.make_replica_check = make
runpy.run_module("trainer", run_name="__main__")
"""


@pytest.mark.slow
def test_a_replica_that_differs_ends_the_run_with_a_code_of_its_own_and_voids_local_copies(
    tiny_config, dataset_path, tmp_path
):
    fields = TINY | {"data.path": dataset_path, "faults.check_replicas_every_steps": 7}
    fields |= {"checkpoint.local_folder": tmp_path / "local", "checkpoint.local_every_steps": 2}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-c", FLIPS_A_BIT, "--config=configs/demo.py", f"--workdir={tmp_path}/run", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == EXIT_CORRUPT, done.stderr
    assert "after step 7 the replicas of " in done.stderr and "of host 0 differs from 7 others" in done.stderr
    assert not list((tmp_path / "local").iterdir())  # of step 6: who knows whether it was right
