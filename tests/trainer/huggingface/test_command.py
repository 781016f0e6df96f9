"""`python -m trainer.export --format=hf`, from a run's workdir to a folder that loads."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import demo
from data import open_dataset
from tests.support.runs import TINY
from trainer import export
from trainer.checkpoints.checksums import seal_path
from trainer.checkpoints.manager import Checkpoints
from trainer.mesh import make_mesh
from trainer.settings import read_settings
from trainer.state import abstract_state

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def workdir(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished at step 30, though it never trained."""
    config = demo.get_config()
    config.update_from_flattened_dict(TINY | {"data.path": str(dataset_path), "model.attention": "reference"})
    settings, folder = read_settings(config), tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put((0.1 * generator.standard_normal(x.shape)).astype(x.dtype), x.sharding),
        abstract_state(settings, make_mesh(settings.mesh)),
    )
    checkpoints = Checkpoints(str(folder), settings, open_dataset(dataset_path).manifest.fingerprint)
    checkpoints.save(30, state._replace(step=state.step * 0 + 30), {"step": 30}, None)
    checkpoints.wait()
    checkpoints.close()
    (folder / "result.json").write_text(json.dumps({"steps": 30, "loss": 3.25, "perplexity": 25.79}))
    return folder


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    export.main()


def mistake(monkeypatch, capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_a_run_s_folder_loads_with_its_tokenizer_and_card(workdir, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "folder"
    run(monkeypatch, workdir, "--format=hf", "-o", folder)
    assert capsys.readouterr().out == f"{folder}\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the mask of a token", "old words fade"], return_tensors="pt", padding=True)
    assert model.generate(**batch, max_new_tokens=4).shape[0] == 2
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ours = export.load_model(str(workdir))[0]
    tokens_BN = np.asarray(batch["input_ids"][:1])
    with torch.no_grad():
        found = model(torch.from_numpy(tokens_BN)).logits.numpy()
    np.testing.assert_allclose(found, np.asarray(ours(jnp.asarray(tokens_BN))), atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "| updates | 30 of 30 |" in card and "| validation perplexity | 25.79 |" in card
    assert "| tokens | 15,360 |" in card and "SelectiveCache" in card


def test_an_exported_checkpoint_becomes_a_folder_with_its_tokenizer_or_with_another(
    workdir, dataset_path, monkeypatch, tmp_path, capsys
):
    run(monkeypatch, f"--workdir={workdir}", f"--output={tmp_path}/checkpoint")
    run(monkeypatch, tmp_path / "checkpoint", "--format=hf", "-o", tmp_path / "brought")
    (tmp_path / "checkpoint" / "tokenizer.model").unlink()
    said = mistake(monkeypatch, capsys, tmp_path / "checkpoint", "--format=hf", "-o", tmp_path / "folder")
    assert said == f"error: there is no tokenizer in {tmp_path}/checkpoint; give --tokenizer, a file or a folder\n"
    assert not (tmp_path / "folder").exists()
    tokenizer = f"--tokenizer={dataset_path / 'tokenizer.model'}"
    run(monkeypatch, tmp_path / "checkpoint", "--format=hf", "-o", tmp_path / "folder", tokenizer, "--dtype=bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    again = tmp_path / "folder" / "tokenizer.json"
    assert (tmp_path / "brought" / "tokenizer.json").read_bytes() == again.read_bytes()
    run(monkeypatch, workdir, "--format=hf", "-o", tmp_path / "again", f"--tokenizer={again.parent}")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one checkpoint"),
        (["RUN", "--workdir=RUN"], "give one checkpoint"),
        (["RUN", "--format=hf"], "--format=hf needs --output"),
        (["RUN", "--dtype=bfloat16"], "belong to --format=hf"),
        (["RUN", "--format=hf", "-o", "gs://bucket/folder"], "written on this machine, not to gs://bucket/folder"),
        (["RUN", "--format=hf", "-o", "RUN"], "is there and not empty"),
        (["nowhere", "--format=hf", "-o", "new"], "there is no checkpoint in nowhere/checkpoints"),
    ],
)
def test_mistakes_are_said_in_one_line(workdir, monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    error = mistake(monkeypatch, capsys, *[argument.replace("RUN", str(workdir)) for argument in arguments])
    assert said in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_another_dataset_than_the_run_s_gives_no_tokenizer(workdir, monkeypatch, capsys, tmp_path):
    shutil.copytree(workdir, tmp_path / "moved")
    checkpoint = epath.Path(tmp_path / "moved" / "checkpoints" / "30")
    metadata = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    metadata["custom_metadata"]["dataset_fingerprint"] = "another"
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    seal_path(checkpoint).unlink()
    said = mistake(monkeypatch, capsys, tmp_path / "moved", "--format=hf", "-o", tmp_path / "new")
    assert "does not hold the run's dataset any more; give its tokenizer with --tokenizer" in said
