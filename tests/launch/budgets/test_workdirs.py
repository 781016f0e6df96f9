"""What the commands read of a training run's workdir, and that they leave it as it is."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs import demo
from data import open_dataset
from launch.budgets.inputs import load_model
from selective_attention import TransformerConfig, import_safetensors
from tests.support.runs import TINY
from trainer.checkpoints.manager import Checkpoints
from trainer.export import export, main
from trainer.mesh import make_mesh
from trainer.settings import read_settings
from trainer.state import abstract_state


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one checkpoint, whose run had chosen how its machines compute; its dataset is not there any more."""
    return make_workdir(tmp_path_factory.mktemp("run"), {}, "fingerprint")


def make_workdir(folder: Path, more: dict[str, object], fingerprint: str) -> Path:
    config = demo.get_config()
    fields = {"model.attention": "reference", "model.remat": "block"}
    config.update_from_flattened_dict(TINY | fields | more)
    settings, generator = read_settings(config), np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(generator.integers(1, 100, x.shape).astype(x.dtype), x.sharding),
        abstract_state(settings, make_mesh(settings.mesh)),
    )
    checkpoints = Checkpoints(str(folder), settings, fingerprint)
    checkpoints.save(3, state._replace(step=state.step * 0 + 3), {"step": 3}, None)
    checkpoints.wait()
    checkpoints.close()
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_workdir_s_model_is_that_of_its_export_and_nothing_is_written(workdir, tmp_path):
    before = files(workdir)
    model = load_model(workdir)
    assert files(workdir) == before
    exported = import_safetensors(export(str(workdir), str(tmp_path / "export")))
    assert model.config == exported.config
    assert all(getattr(model.config, name) != "block" for name in TransformerConfig.machine_fields())
    for (path, parameter), (_, other) in zip(
        *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, exported)), strict=True
    ):
        np.testing.assert_array_equal(parameter[...], other[...], err_msg=str(path))


def test_an_export_in_the_workdir_can_be_read_by_whom_the_umask_lets(workdir):
    before = os.umask(0o022)
    try:
        folder = export(str(workdir))
    finally:
        os.umask(before)
    modes = {path.relative_to(workdir).as_posix(): path.stat().st_mode & 0o777 for path in files(workdir / "export")}
    assert modes == {"export/3": 0o755, "export/3/config.json": 0o644, "export/3/model.safetensors": 0o644}
    assert export(str(workdir)) == folder


@pytest.mark.parametrize("is_same", [True, False])
def test_an_export_brings_the_tokenizer_of_the_very_dataset(dataset_path, tmp_path, is_same):
    fingerprint = open_dataset(dataset_path).manifest.fingerprint if is_same else "another"
    run = make_workdir(tmp_path, {"data.path": str(dataset_path)}, fingerprint)
    brought = export(str(run)) / "tokenizer.model"
    assert brought.exists() == is_same
    assert not is_same or brought.read_bytes() == (dataset_path / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("more", [[], ["--output=gs://bucket/export"]])
def test_an_export_into_a_bucket_is_refused_in_one_line(more, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["export", "--workdir=gs://bucket/run", *more])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: an export is written on this machine, not to gs://bucket/")
    assert said.endswith("; give a folder with --output\n") and said.count("\n") == 1
