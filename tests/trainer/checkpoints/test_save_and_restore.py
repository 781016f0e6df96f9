"""Saving, keeping and restoring, on real files."""

import gc
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import demo
from trainer.checkpoints import saving
from trainer.checkpoints.digest import digest
from trainer.checkpoints.disk import check_workdir
from trainer.checkpoints.identity import Identity
from trainer.checkpoints.manager import Checkpoints
from trainer.errors import ConfigError, LeaseError, ResumeError
from trainer.export import load_model
from trainer.mesh import make_mesh
from trainer.settings import read_settings
from trainer.state import TrainState, abstract_state


@pytest.fixture
def config() -> ConfigDict:
    config = demo.get_config()
    fields = {"context_length": 32, "model.width": 2, "model.vocab_size": 304}
    config.update_from_flattened_dict(fields | {"checkpoint.keep_last": 2, "checkpoint.keep_every_steps": 4})
    return config


def layout(config: ConfigDict, **axes: int) -> TrainState:
    with config.unlocked():
        config.mesh.update({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | axes)
    settings = read_settings(config)
    return abstract_state(settings, make_mesh(settings.mesh))


def random_state(config: ConfigDict, abstract: TrainState) -> TrainState:
    """Every array different from zero, so that a mix-up would show."""
    generator = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(generator.integers(1, 100, x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(fill, abstract)


def save(checkpoints: Checkpoints, step: int, state: TrainState, loss: float | None = None) -> None:
    checkpoints.save(step, state._replace(step=state.step * 0 + step), {"step": step}, loss)
    checkpoints.wait()


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_state_is_bit_equal_on_three_meshes_one_after_the_other(config, tmp_path):
    meshes = ({"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2})
    expected, digests = None, []
    for number, axes in enumerate(meshes):
        abstract = layout(config, **axes)
        checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
        restored = checkpoints.restore(abstract)
        state = random_state(config, abstract) if restored is None else restored.state
        assert jax.tree.leaves(jax.tree.map(lambda x, a: x.sharding == a.sharding, state, abstract)).count(False) == 0
        arrays = [np.asarray(x) for x in jax.tree.leaves(state)][1:]
        digests.append({name: value for name, value in digest(state).items() if name != ".step"})
        if expected is not None:
            for found, array in zip(arrays, expected, strict=True):
                np.testing.assert_array_equal(found, array)
        expected = arrays
        save(checkpoints, number + 1, state)
        checkpoints.close()
        assert checkpoints.saved_step == number + 1
    assert digests[0] == digests[1] == digests[2]


def test_digest_sees_a_flipped_bit_and_two_elements_swapped():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    flipped, swapped = x.copy(), x.copy()
    flipped.view(np.uint32)[2, 3] ^= 1 << 31
    swapped[[0, 2]] = swapped[[2, 0]]
    found = [digest({"x": jax.numpy.asarray(array)})["['x']"] for array in (x, flipped, swapped)]
    assert len(set(found)) == 3
    bits, index = x.view(np.uint32).astype(object).ravel(), np.arange(24).astype(object)
    assert found[0] == sum(bits * (index * 2_654_435_761 % 2**32 | 1)) % 2**32


@pytest.mark.slow
@pytest.mark.parametrize("reopen", [False, True])
def test_last_two_multiples_of_four_and_the_best_are_kept(config, tmp_path, reopen):
    abstract = layout(config, data=8)
    state = random_state(config, abstract)
    losses = {1: 3.0, 2: 1.5, 3: math.nan, 4: None, 5: 2.0, 6: -math.inf, 7: None, 8: 9.0, 9: None}
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    for step, loss in losses.items():
        if reopen and step == 6:
            checkpoints.close()
            checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
            checkpoints.restore(abstract)
        save(checkpoints, step, state, loss)
    checkpoints.close()
    assert steps(tmp_path) == [2, 4, 8, 9]
    assert len(list((tmp_path / "checkpoints").glob("*.checksums.json"))) == 4


@pytest.mark.slow
def test_the_only_checkpoint_is_not_deleted_before_the_next_is_sealed(config, tmp_path, monkeypatch):
    config.update_from_flattened_dict({"checkpoint.keep_last": 1, "checkpoint.keep_every_steps": 0})
    state = random_state(config, layout(config, data=8))
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    save(checkpoints, 1, state)
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    blocked = tmp_path / "checkpoints" / "2.checksums.json"
    blocked.mkdir()  # the seal cannot be put there
    save(checkpoints, 2, state)
    assert checkpoints.poll() == "failed" and checkpoints.saved_step == 1
    assert steps(tmp_path) == [1, 2]
    blocked.rmdir()
    save(checkpoints, 2, state)
    assert checkpoints.poll() == "idle" and checkpoints.failures_in_a_row == 0
    assert steps(tmp_path) == [2]
    checkpoints.close()


def test_no_checkpoint_is_completed_while_the_folder_may_be_another_runs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    state = random_state(config, layout(config, data=8))
    refusals = [LeaseError("out of sight")]

    def confirm() -> None:
        if refusals:
            raise refusals.pop()

    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint", confirm=confirm)
    save(checkpoints, 1, state)
    assert checkpoints.poll() == "failed" and checkpoints.saved_step is None
    assert not list((tmp_path / "checkpoints").glob("*.checksums.json"))
    save(checkpoints, 1, state)
    assert checkpoints.poll() == "idle" and checkpoints.saved_step == 1
    checkpoints.close()


def test_rolled_back_steps_are_renamed_and_can_be_saved_again(config, tmp_path, caplog):
    abstract = layout(config, data=8)
    state = random_state(config, abstract)
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    for step in (1, 2, 3):
        save(checkpoints, step, state)
    checkpoints.set_aside_after(2)
    assert checkpoints.saved_step == checkpoints.restore(abstract).step == 2
    assert "is gone" not in caplog.text
    save(checkpoints, 3, state)
    checkpoints.close()
    assert checkpoints.failure is None and steps(tmp_path) == [2, 3]
    assert (tmp_path / "checkpoints" / "3.rolled-back" / "state").exists()


def test_changed_field_is_refused_by_name_unless_overridden(config, tmp_path):
    abstract = layout(config, data=8)
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    save(checkpoints, 1, random_state(config, abstract))
    checkpoints.close()
    config.optimizer.b2, config.seed, config.eval.batches = 0.5, 7, 3
    for override, message in (
        ([], r"optimizer.b2: 0.999 -> 0.5; seed: 0 -> 7.*--override-resume=optimizer.b2 --override-resume=seed"),
        (["seed"], r"\(optimizer.b2: 0.999 -> 0.5\)"),
    ):
        checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint", override)
        with pytest.raises(ResumeError, match=message):
            checkpoints.restore(abstract)
        checkpoints.close()
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint", ["seed", "optimizer"])
    assert checkpoints.restore(abstract).step == 1
    checkpoints.close()
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "another", ["seed", "optimizer"])
    with pytest.raises(ResumeError, match="trained on dataset fingerprint"):
        checkpoints.restore(abstract)
    checkpoints.close()


def test_a_checkpoint_from_before_a_field_was_added_is_continued_and_loaded(config, tmp_path, monkeypatch):
    abstract, metadata = layout(config, data=8), Identity.metadata

    def older(identity: Identity) -> dict:
        saved = metadata(identity)
        del saved["config"]["model"]["qk_norm"], saved["config"]["model"]["scan_layers"]
        return saved

    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    with monkeypatch.context() as patch:
        patch.setattr(Identity, "metadata", older)
        save(checkpoints, 1, random_state(config, abstract))
    checkpoints.close()
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    assert checkpoints.restore(abstract).step == 1
    checkpoints.close()
    assert load_model(str(tmp_path))[1].model.scan_layers == read_settings(config).model.scan_layers
    config.model.qk_norm = False
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    with pytest.raises(ResumeError, match=r"model.qk_norm: True -> False"):
        checkpoints.restore(abstract)
    checkpoints.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("optimizer.b3", "no such field; did you mean optimizer.b"), ("mesh.data", "may always differ")],
)
def test_override_that_means_nothing_is_refused(config, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoints(str(tmp_path), read_settings(config), "fingerprint", [name])


@pytest.mark.slow
def test_disk_that_fills_during_a_save_costs_nothing_that_was_saved(config, small_disk, monkeypatch, caplog):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    config.update_from_flattened_dict({"model.width": 1})
    abstract = layout(config, data=8)
    state = random_state(config, abstract)
    checkpoints = Checkpoints(str(small_disk), read_settings(config), "fingerprint")
    save(checkpoints, 1, state)
    assert checkpoints.poll() == "idle", checkpoints.failure
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 8192))
    for number in (1, 2):  # the second is a failure of its own, not the first one's echo
        save(checkpoints, 2, state)
        assert checkpoints.poll() == "failed" and checkpoints.failures_in_a_row == number
        assert "disk of" in checkpoints.failure and "is full" in checkpoints.failure
    traced = [record for record in caplog.records if record.exc_info and "No space left" in str(record.exc_info[1])]
    assert "is full" in caplog.text and not traced  # one line, without Orbax's dozen of tracebacks
    assert not list((small_disk / "checkpoints").glob("*tmp*"))
    assert checkpoints.saved_step == checkpoints.restore(abstract).step == 1
    filler.unlink()
    save(checkpoints, 3, state)
    assert checkpoints.poll() == "idle" and checkpoints.saved_step == 3 and checkpoints.failures_in_a_row == 0
    checkpoints.close()


@pytest.mark.slow
def test_a_save_keeps_no_memory(config, tmp_path):
    config.update_from_flattened_dict({"model.width": 1})
    state = random_state(config, layout(config, data=8))
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")

    def blocks_after(steps: range) -> int:
        """Of Python's own memory."""
        for step in steps:
            save(checkpoints, step, state)
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after(range(1, 7))  # what is kept once is there then
    assert (blocks_after(range(7, 19)) - before) / 12 < 100
    checkpoints.close()


def test_a_disk_too_small_for_a_checkpoint_is_refused_at_the_start(small_disk):
    with pytest.raises(ResumeError, match=r"0\.00 GB free.*needs 0\.01 GB"):
        check_workdir(str(small_disk), checkpoint_bytes=10_000_000)


def save_in_vain(checkpoints: Checkpoints, step: int, state: TrainState, number: int) -> None:
    """A save that fails, as this many in a row."""
    checkpoints.save(step, state, {}, None)
    wait_until(lambda: checkpoints.poll() != "saving")
    assert checkpoints.poll() == "failed" and checkpoints.failures_in_a_row == number


def save_at_last(checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    """Saves as soon as what hung has ended, and closes."""

    def saved() -> bool:
        save(checkpoints, step, state)
        return checkpoints.saved_step == step

    wait_until(saved)
    checkpoints.close()
    assert checkpoints.failure is None and checkpoints.failures_in_a_row == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to this"
        time.sleep(0.05)


@pytest.fixture
def pipe(tmp_path: Path):
    """What the seal of step 2 is written to: whoever opens it waits for a reader."""
    path = tmp_path / "checkpoints" / "2.checksums.json.tmp"
    path.parent.mkdir()
    os.mkfifo(path)
    yield path
    if path.exists():
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


@pytest.mark.slow
def test_a_seal_that_hangs_is_given_up_and_saving_goes_on_afterwards(config, tmp_path, pipe):
    config.checkpoint.timeout_seconds = 10
    state = random_state(config, layout(config, data=8))
    checkpoints = Checkpoints(str(tmp_path), read_settings(config), "fingerprint")
    save(checkpoints, 1, state)
    save_in_vain(checkpoints, 2, state, number=1)
    assert "saving step 2 failed: not done after 12 s" in checkpoints.failure
    save_in_vain(checkpoints, 2, state, number=2)
    assert "the save before has not ended on host 0" in checkpoints.failure
    assert checkpoints.saved_step == 1
    pipe.read_text()
    seal = pipe.with_suffix("")  # it becomes the seal, and is read back
    wait_until(seal.exists)
    seal.write_text("{}")
    seal.unlink()
    save_at_last(checkpoints, 3, state)
