"""Of a run that was interrupted, has crashed and was rolled back, both files say what they say of a quiet one."""

import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import loop, outcomes
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED
from trainer.hosts.interrupt import Interrupt
from trainer.loop import train
from trainer.metrics.json_lines import read_metrics
from trainer.metrics.writer import MetricsWriter
from trainer.settings import read_settings

pytestmark = pytest.mark.slow
BAD_STEP = 23  # the run goes back to step 20
# What the clock decides.
TIMES = ("run/tokens_per_second", "run/step_seconds", "run/goodput", "time/", "system/", "warning/")


class Disturbance(MetricsWriter):
    """Interrupts its run, or ends it with an exception, once a step is written."""

    def __init__(self, workdir, step, ending):
        self.interrupt, self._step, self._ending = Interrupt(), step, ending
        self._seal = workdir / "checkpoints" / f"{step - step % 5}.checksums.json"  # of the newest checkpoint

    def write(self, step, scalars):
        if step == self._step and "run/loss" in scalars:
            if self._ending == "crash":
                while not self._seal.exists():  # its thread goes on after the exception, unlike that of a dead process
                    time.sleep(0.05)
                raise RuntimeError("the host is gone")
            self.interrupt.requested = True


@pytest.fixture(scope="module")
def runs(dataset_path, tmp_path_factory):
    """The workdirs of two runs of the same config: disturbed, undisturbed."""
    from configs import demo
    from tests.support.runs import TINY

    config = demo.get_config()
    fields = {"data.path": str(dataset_path), "faults.max_bad_steps": 1, "eval.pictures": True}
    config.update_from_flattened_dict(TINY | fields)
    settings, patch = read_settings(config), pytest.MonkeyPatch()
    real = loop.compile_train_step
    for module in (loop, outcomes):
        patch.setattr(module, "NORMS_EVERY", 5)

    def compile_once_bad(*arguments):
        compiled, bad = real(*arguments), [BAD_STEP]

        def step(state, batch, requests):
            number = int(jax.device_get(state.step)) + 1
            state, metrics = compiled(state, batch, requests)
            if number in bad:
                bad.remove(number)
                metrics |= {"loss": jax.device_put(np.float32(np.nan)), "bad_steps": jax.device_put(np.float32(1))}
            return state, metrics

        return step

    patch.setattr(loop, "compile_train_step", compile_once_bad)
    disturbed, undisturbed = tmp_path_factory.mktemp("disturbed"), tmp_path_factory.mktemp("undisturbed")
    for step, ending in ((6, "interruption"), (13, "crash"), (16, "interruption")):
        disturbance = Disturbance(disturbed, step, ending)
        if ending == "crash":
            with pytest.raises(RuntimeError, match="the host is gone"):
                train(settings, str(disturbed), disturbance.interrupt, writers=[disturbance])
        else:
            assert train(settings, str(disturbed), disturbance.interrupt, writers=[disturbance]) == EXIT_PREEMPTED
    for workdir in (disturbed, undisturbed):
        assert train(settings, str(workdir)) == EXIT_FINISHED
    patch.undo()
    return disturbed, undisturbed


def in_tensorboard(workdir):
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_json_lines(workdir):
    scalars = read_metrics(workdir).scalars
    return {tag: list(zip(series.steps, series.values, strict=True)) for tag, series in scalars.items()}


@pytest.mark.parametrize("read", [in_tensorboard, in_json_lines])
def test_every_tag_has_each_of_its_steps_once_and_in_order(runs, read):
    for tag, points in read(runs[0]).items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


@pytest.mark.parametrize("read", [in_tensorboard, in_json_lines])
def test_all_that_the_clock_does_not_decide_is_as_in_the_undisturbed_run(runs, read):
    disturbed, undisturbed = (
        {tag: points for tag, points in read(workdir).items() if not tag.startswith(TIMES)} for workdir in runs
    )
    assert disturbed.keys() == undisturbed.keys()
    for tag, points in undisturbed.items():
        assert disturbed[tag] == points, tag
    assert [step for step, _ in disturbed["run/loss"]] == list(range(1, 31))
    assert [step for step, _ in disturbed["weights_gradient_norm/layer_00_mlp"]] == list(range(5, 31, 5))
    assert [step for step, _ in disturbed["run/validation_bits_per_byte"]] == [10, 20, 30]


def test_both_files_say_the_same(runs):
    tensorboard, json_lines = in_tensorboard(runs[0]), in_json_lines(runs[0])
    assert tensorboard.keys() == json_lines.keys()
    for tag, points in tensorboard.items():
        assert [step for step, _ in points] == [step for step, _ in json_lines[tag]], tag
        np.testing.assert_allclose([x for _, x in points], [x for _, x in json_lines[tag]], rtol=1e-6, err_msg=tag)


def test_restarts_and_rollbacks_are_told_apart(runs):
    begins = [(begin.first_step, begin.is_rollback) for begin in read_metrics(runs[0]).begins]
    assert [is_rollback for _, is_rollback in begins] == [False] * 4 + [True]
    assert begins[0] == (1, False) and begins[2] == (11, False) and begins[4] == (21, True)


def test_pictures_texts_and_hyperparameters_are_there(runs):
    events = EventAccumulator(str(runs[0] / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"selection/layers", "selection/text"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("selection/text")] == [10, 20, 30]
    metrics = read_metrics(runs[0])
    assert {"config", "environment", "command"} <= metrics.texts.keys()
    assert metrics.hparams["batch_size"] == 16
    assert {"_hparams_/session_start_info", "custom_scalars__config__", "run/config"} <= set(events.Tags()["tensors"])
