"""Training an encoder-decoder on blanks: as a decoder is trained, on any mesh, and what does not take it says so."""

import itertools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import t5
from data import EvalBatches, open_dataset
from launch.report.__main__ import write_report
from launch.spans import blanks_of, right, write
from launch.status import main as status
from selective_attention import EncoderDecoder
from tests.support import ROOT
from tests.support.runs import TINY, assert_same_run, points
from trainer.batches import batch_sharding, global_batch
from trainer.beginning import first_state
from trainer.checks import check_batch
from trainer.errors import EXIT_PREEMPTED, ConfigError, ResumeError
from trainer.export import load, load_model
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.requests import Request, request_array
from trainer.loop import train
from trainer.mesh import AXES, make_mesh
from trainer.metrics.flops import matmul_flops, model_flops
from trainer.settings import changed, read_settings
from trainer.source import open_source
from trainer.state import init_state
from trainer.step import make_train_step

SMALL = TINY | {
    "model.vocab_size": 304,
    "model.num_layers": 1,
    "steps": 12,
    "mesh.data": 8,
    "optimizer.warmup_steps": 4,
}
SMALL |= {"checkpoint.every_steps": 4, "eval.every_steps": 6, "eval.batches": 2}


def settings_of(dataset_path, variant="toy", **changes):
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return changed(read_settings(t5.get_config(variant)), SMALL | {"data.path": str(dataset_path)} | fields)


def first_step(settings, source, shape):
    """Loss, memory loss and gradient of the first step on a mesh."""
    mesh = make_mesh(
        changed(settings, {f"mesh.{a}": n for a, n in zip(AXES, shape, strict=True)}).mesh,
        jax.devices()[: math.prod(shape)],
    )
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(settings))()
        batch = global_batch(source, 0, batch_sharding(mesh))
        requests = request_array(mesh, np.zeros((mesh.size, len(Request)), np.int32))
        state, metrics = jax.jit(make_train_step(settings, pad_id=0))(state, batch, requests)
        (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        gradient = jax.tree_util.tree_leaves_with_path(jax.device_get(adam.mu))
        return float(metrics["loss"]), float(metrics["memory_loss"]), gradient


@pytest.fixture(scope="module")
def on_one_device(dataset_path):
    settings = settings_of(dataset_path, "toy,memory", model__num_heads=2, model__head_dim=32)
    source = open_source(settings).train
    return settings, source, first_step(settings, source, (1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "parts"), [((2, 2, 1, 2), 1), ((2, 1, 1, 1), 4)])
def test_meshes_and_parts_give_the_gradient_of_one_device(on_one_device, shape, parts):
    settings, source, (loss, memory, expected) = on_one_device
    found = first_step(changed(settings, {"accumulation": parts}), source, shape)
    assert found[:2] == pytest.approx((loss, memory), rel=1e-5) and memory > 0
    for (path, x), (_, y) in zip(expected, found[2], strict=True):
        error = np.linalg.norm(y - x) / np.linalg.norm(x)
        assert error < 5e-5, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.fixture(scope="module")
def run(dataset_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("spans") / "run"
    settings = settings_of(dataset_path)
    assert train(settings, str(workdir)) == 0
    return workdir, settings


def test_a_run_learns_validates_and_shows_what_is_masked(run, capsys):
    workdir, _ = run
    result = json.loads((workdir / "result.json").read_text())
    validation = points(workdir, "run/validation_loss")
    assert validation.keys() == {6, 12} and validation[12] == pytest.approx(result["loss"], abs=1e-6)
    assert validation[12] < points(workdir, "run/loss")[1] and "bits_per_byte" not in result
    assert points(workdir, "selection_mean_f/layer_00").keys() == {6, 12}
    assert status([str(workdir)]) == 0 and "12" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_ends_as_the_undisturbed_one(run, tmp_path):
    class InterruptedAtOnce(Interrupt):
        def can_save(self, within_seconds):
            self.requested = True

    workdir, settings = run
    assert train(settings, str(tmp_path / "disturbed"), InterruptedAtOnce()) == EXIT_PREEMPTED
    assert train(settings, str(tmp_path / "disturbed")) == 0
    assert_same_run(tmp_path / "disturbed", workdir)


@pytest.mark.slow
def test_what_a_run_writes_is_compared_with_the_windows_themselves(run, dataset_path):
    workdir, settings = run
    model, _, _ = load(str(workdir), EncoderDecoder)
    dataset = open_dataset(dataset_path)
    known = dataset.manifest.vocab_size
    (batch,) = write(model, settings, dataset, windows=5)
    assert batch["written"].shape == batch["targets"].shape == (5, settings.lengths["targets"])
    windows = EvalBatches(dataset, context_length=32, batch_size=32).rows(0, range(5))["targets"]
    for window, inputs, targets in zip(windows, batch["encoder_inputs"], batch["targets"], strict=True):
        left = [t for t in inputs.tolist() if 0 < t < known]
        blanks = blanks_of(targets, known)
        assert sorted([*left, *itertools.chain(*blanks)]) == sorted(window.tolist())
        spoilt = targets.copy()
        spoilt[1] += 1
        assert all(right(targets, targets, known, 0)) and right(spoilt, targets, known, 0) == [False] + [True] * (
            len(blanks) - 1
        )


@pytest.mark.slow
@pytest.mark.parametrize("module", ["launch.spans", "trainer.export", "launch.evaluate", "launch.budgets search"])
def test_commands_show_blanks_or_say_what_does(run, dataset_path, tmp_path, module):
    workdir, _ = run
    flags = {"launch.spans": [str(workdir), "--windows=3", "--show=1"]}
    flags["launch.budgets search"] = [
        f"--checkpoint={workdir}",
        f"--data={dataset_path}",
        f"--output={tmp_path}/b.json",
        "--target-perplexity=9",
    ]
    flags["launch.evaluate"] = [f"--checkpoint={workdir}", "--tasks=perplexity"]
    command = [sys.executable, "-m", *module.split(), *flags.get(module, [str(workdir)])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if module == "launch.spans":
        assert done.returncode == 0 and "[0]" in done.stdout and "blanks in 3 windows right" in done.stdout, done.stderr
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "takes decoders; see what it writes with python -m launch.spans" in done.stderr


@pytest.mark.slow
def test_the_report_has_the_run_and_says_why_there_is_no_sample(run, dataset_path, tmp_path):
    write_report({"t5": str(run[0])}, tmp_path, dataset_path=dataset_path)
    page = (tmp_path / "index.html").read_text()
    assert "What is masked" in page and "takes decoders" in page


@pytest.mark.slow
def test_a_decoder_s_commands_refuse_the_run(run):
    with pytest.raises(ResumeError, match="trains an encoder-decoder, and this command takes decoders"):
        load_model(str(run[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__vocab_size": 301}, "300 token ids, and blanks in contexts of 32 need 3 more; .*vocab_size=303"),
        ({"model__architecture": "encoder"}, "must be decoder or encoder_decoder, got 'encoder'"),
        ({"data__task": "parity"}, "leave out --config.data.task=parity"),
        ({"data__corruption__rate": 1.5}, "--config.data.corruption: rate must be above 0 and below 1, got 1.5"),
    ],
)
def test_what_makes_no_blanks_is_refused(dataset_path, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        train(settings_of(dataset_path, **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_split_sequences_and_exported_decoders_are_refused(dataset_path):
    settings = settings_of(dataset_path)
    with pytest.raises(ConfigError, match=r"mesh context=2: .* set --config\.mesh\.context=1"):
        check_batch(settings, {"data": 4, "fsdp": 1, "context": 2, "tensor": 1})
    with pytest.raises(ConfigError, match=r"--init_from=there: .* leave the flag out"):
        first_state(settings, "there")


def test_flops_of_d12_are_those_of_a_calculation_by_hand():
    settings = read_settings(t5.get_config("d12"))
    attention, mlp, logits = 12 * 4 * 768**2, 12 * 3 * 768 * 2048, 8320 * 768
    cross = 12 * 2 * 768**2
    products = 464 * (attention + mlp + cross) + 104 * (attention + mlp + cross + logits)
    assert matmul_flops(settings) == 6 * 256 * products
    pairs = 464 * 464 + 104 * 104 / 2 + 464 * 104
    assert model_flops(settings) == 6 * 256 * products + 256 * 12 * 12 * 768 * pairs
