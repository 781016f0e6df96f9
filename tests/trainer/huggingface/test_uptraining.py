"""A pretrained model of Llama's family is trained on with selection switched on, and goes back to transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import uptrain
from data import TrainBatches, load_tokenizer, open_dataset
from inference_budget import model_fingerprint
from launch.budgets.inputs import load_model
from tests.support.datasets import SENTENCE, prepare_c4
from tests.support.runs import assert_same_run, points
from tests.support.tokenizers import make_tokenizer
from trainer.beginning import trained_values
from trainer.errors import ConfigError
from trainer.export import export_hugging_face
from trainer.import_hf import import_folder
from trainer.loop import train
from trainer.settings import Settings, changed, read_settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 32
# None of these is what a config's width would make it; the vocabulary is larger than the dataset's.
SIZES = {"vocab_size": 304, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SHAPES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 256}
ROPE = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHOICES = {"rms_norm_eps": 1e-5, "rope_parameters": ROPE | {"original_max_position_embeddings": 64}}
RUN: dict[str, object] = {
    "context_length": LENGTH,
    "batch_size": 8,
    "steps": 4,
    "optimizer.warmup_steps": 1,
    "optimizer.peak_lr": 0.01,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 9,
    "eval.pictures": False,
    "log_every_steps": 1,
    "model.attention": "reference",
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs`, with random weights as large as trained ones, and `checkpoint`, the same imported."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **SHAPES, **CHOICES, dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "theirs")
    import_folder(folder / "theirs", folder / "checkpoint")
    return folder


def settings_of(checkpoint: Path, dataset: Path, **more: object) -> Settings:
    return changed(read_settings(uptrain.get_config(str(checkpoint))), RUN | {"data.path": str(dataset)} | more)


def loss_there(folder: Path, settings: Settings) -> float:
    """Of the first batch, by transformers."""
    dataset = open_dataset(settings.data.path)
    source = TrainBatches(dataset, context_length=LENGTH, batch_size=settings.batch_size, seed=settings.seed)
    batch = source.rows(0, range(settings.batch_size))
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    targets = torch.from_numpy(batch["targets"].astype(np.int64)).flatten()
    with torch.no_grad():
        logits = model(torch.from_numpy(batch["inputs"].astype(np.int64))).logits.flatten(0, 1)
    pad_id = dataset.manifest.tokenizer.pad_id
    return float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=pad_id))


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["own_head", "paper"])
def test_an_imported_llama_is_trained_on_resumed_and_exported(selection, pretrained, dataset_path, tmp_path):
    settings = settings_of(pretrained / "checkpoint", dataset_path, **{"model.selection": selection})
    workdir, again = tmp_path / "run", tmp_path / "again"
    assert train(settings, str(workdir), init_from=str(pretrained / "checkpoint")) == 0
    losses, expected = points(workdir, "run/loss"), loss_there(pretrained / "theirs", settings)
    if selection == "own_head":
        assert losses[1] == pytest.approx(expected, abs=1e-5)  # the step's loss is of the parameters before it
    else:
        assert abs(losses[1] - expected) > 1e-3  # head 0 masks at once
    assert losses[4] < losses[1]
    # What was recorded is the whole config: the run goes on without the folder.
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    for name in ("4.checksums.json", "4.json"):
        (again / "checkpoints" / name).unlink(missing_ok=True)
    (again / "result.json").unlink()
    (again / "newest_checkpoint").unlink(missing_ok=True)
    assert train(settings, str(again)) == 0
    assert_same_run(again, workdir)
    # And so is what others read of it.
    export_hugging_face(str(workdir), str(tmp_path / "folder"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert (model.config.selection, model.config.head_dim, model.config.rotary_base) == (selection, 10, 5e4)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["fingerprint"] == model_fingerprint(
        load_model(workdir)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.d_model": 64}, "its d_model is 24, but the config makes it 64; --config=configs/uptrain.py:"),
        ({"model.rotary_scaling.factor": 4.0}, "its rotary_scaling is RotaryScaling"),
        ({"model.tied_embeddings": True}, "its tied_embeddings is False, but the config makes it True"),
        ({"model.norm_epsilon": 1e-6}, "its norm_epsilon is 1e-05, but the config makes it 1e-06"),
    ],
)
def test_a_config_that_contradicts_the_model_is_refused_by_the_field_s_name(change, message, pretrained):
    settings = changed(read_settings(uptrain.get_config(str(pretrained / "checkpoint"))), change)
    with pytest.raises(ConfigError, match=message):
        trained_values(settings.transformer, str(pretrained / "checkpoint"))


def test_the_config_says_everything_of_the_model(pretrained):
    c = uptrain.get_config(str(pretrained / "checkpoint"))
    found = read_settings(c).transformer
    assert (found.d_model, found.mlp_dim, found.head_dim, found.num_kv_heads) == (24, 40, 10, 2)
    assert (found.rotary_scaling.kind, found.rotary_scaling.factor) == ("llama3", 8.0)
    assert (c.context_length, found.dtype, found.selection) == (256, "float32", "own_head")
    for folder, message in ((pretrained / "theirs", "no model's of this repository"), ("nowhere", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            uptrain.get_config(str(folder))
    with pytest.raises(ValueError, match="give a model's folder"):
        uptrain.get_config()


@pytest.mark.slow
def test_a_run_on_text_in_the_model_s_own_tokens_goes_back_with_that_tokenizer(pretrained, tmp_path):
    pytest.importorskip("tokenizers")
    folder = make_tokenizer(tmp_path)
    texts = {"train": [f"{SENTENCE} <|end|>"] * 90, "validation": [SENTENCE] * 9}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"vocab_size": 384}, **SHAPES, **CHOICES))
    model.save_pretrained(folder)
    import_folder(folder, tmp_path / "checkpoint")
    dataset = prepare_c4(tmp_path, texts, tokenizer=tmp_path / "checkpoint", record_length=LENGTH)
    settings, workdir = settings_of(tmp_path / "checkpoint", dataset, steps=2), tmp_path / "run"
    assert train(settings, str(workdir), init_from=str(tmp_path / "checkpoint")) == 0
    result = json.loads((workdir / "result.json").read_text())
    text_bytes = 9 * len(SENTENCE)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens"] / np.log(2) / text_bytes)
    export_hugging_face(str(workdir), str(tmp_path / "folder"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder"), load_tokenizer(dataset)
    assert theirs(SENTENCE, add_special_tokens=False)["input_ids"] == ours.encode(SENTENCE)
    assert (again.generation_config.eos_token_id, again.config.vocab_size) == (ours.eos_id, 384)
