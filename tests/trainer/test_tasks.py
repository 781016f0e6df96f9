"""Training on a made-up task: as on a dataset, but for what is counted."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs import synthetic
from data import DataError
from tests.support.runs import TINY, assert_same_run, points
from trainer.batches import batch_sharding, global_batch
from trainer.errors import EXIT_PREEMPTED, ConfigError, ResumeError
from trainer.evaluate import evaluate
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.requests import Request, request_array
from trainer.loop import train
from trainer.mesh import AXES, make_mesh
from trainer.settings import changed, read_settings
from trainer.source import open_source
from trainer.state import init_state, model_graph
from trainer.step import make_eval_step, make_train_step

SMALL = {"model.num_layers": 1, "model.vocab_size": 40, "mesh.data": 4, "mesh.fsdp": 2, "steps": 12}
SMALL = TINY | SMALL | {"checkpoint.every_steps": 4, "eval.every_steps": 6, "eval.batches": 2}


def settings_of(task="assignment", **changes):
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return changed(read_settings(synthetic.get_config(task)), SMALL | fields)


def no_requests(mesh):
    return request_array(mesh, np.zeros((mesh.size, len(Request)), np.int32))


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)])
def test_a_batch_is_the_same_on_every_mesh(shape):
    settings = settings_of()
    source = open_source(settings).train
    mesh = make_mesh(changed(settings, {f"mesh.{a}": n for a, n in zip(AXES, shape, strict=True)}).mesh)
    batch = global_batch(source, 3, batch_sharding(mesh))
    for name, rows in source.rows(3, range(16)).items():
        np.testing.assert_array_equal(np.asarray(batch[name]), rows)


def test_accuracy_is_the_share_of_answers_that_are_the_first_choice():
    settings = settings_of()
    source, mesh = open_source(settings), make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_state(settings).params)()
        step = jax.jit(make_eval_step(settings.transformer, source.pad_id, source.has_answers))
        result = evaluate(step, params, source.validation, 2, batch_sharding(mesh), lambda: no_requests(mesh))
        batches = [global_batch(source.validation, number, batch_sharding(mesh)) for number in range(2)]
        graph = model_graph(settings.transformer)
        logits = [np.asarray(jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, b["inputs"])) for b in batches]
    targets = np.concatenate([np.asarray(batch["targets"]) for batch in batches])
    best = np.concatenate(logits).argmax(axis=-1)
    assert result.tokens == np.sum(targets > 0) > 0
    assert result.correct == np.sum((best == targets) & (targets > 0))
    assert result.figures().keys() == {"loss", "perplexity", "accuracy"}


def test_the_memory_loss_counts_every_token_that_is_there_and_the_loss_answers_alone():
    settings = settings_of(memory_loss__epsilon=0.1)
    source, mesh = open_source(settings), make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(settings))()
        batch = global_batch(source.train, 0, batch_sharding(mesh))
        _, metrics = jax.jit(make_train_step(settings, source.pad_id))(state, batch, no_requests(mesh))
        model = nnx.merge(model_graph(settings.transformer), state.params)
        f_BNM = np.asarray(jax.jit(lambda tokens: model.selection_masks(tokens))(batch["inputs"]))[0]
    targets = np.asarray(batch["targets"])
    assert float(metrics["tokens"]) == np.sum(targets > 0)
    peaks = []
    for f_NM, target_N in zip(f_BNM, targets, strict=True):
        there = np.count_nonzero(target_N)  # padding is behind all else
        kept_N = 1 + np.arange(there) - np.minimum(f_NM[:there], 1).sum(axis=1)
        peaks.append(kept_N.max() / there)
    assert float(metrics["memory_loss"]) == pytest.approx(np.mean(peaks), rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_the_undisturbed_one(tmp_path):
    class InterruptedAtOnce(Interrupt):
        def can_save(self, within_seconds):
            self.requested = True

    settings = settings_of()
    assert train(settings, str(tmp_path / "undisturbed")) == 0
    assert train(settings, str(tmp_path / "disturbed"), InterruptedAtOnce()) == EXIT_PREEMPTED
    assert train(settings, str(tmp_path / "disturbed")) == 0
    assert_same_run(tmp_path / "disturbed", tmp_path / "undisturbed")
    result = json.loads((tmp_path / "undisturbed" / "result.json").read_text())
    accuracies = points(tmp_path / "undisturbed", "run/validation_accuracy")
    assert accuracies.keys() == {6, 12} and accuracies[12] == pytest.approx(result["accuracy"], abs=1e-6)
    assert "bits_per_byte" not in result and not points(tmp_path / "undisturbed", "run/bits_per_byte")
    for other in (settings_of(data__task_names=9), settings_of("parity")):
        with pytest.raises(ResumeError, match=r"was trained on dataset .* but that of --config\.data is"):
            train(other, str(tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data__path": "somewhere"}, ConfigError, "leave out --config.data.path=somewhere"),
        ({"model__vocab_size": 26}, ConfigError, "27 token ids, the model 26; set --config.model.vocab_size=27"),
        ({"data__task": "sorting"}, DataError, "'sorting' is not a task"),
        ({"context_length": 24}, DataError, "context_length 24 is too short .* choose 28"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train(settings_of(**change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
