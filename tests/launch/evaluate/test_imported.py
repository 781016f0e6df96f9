"""Models that were trained elsewhere are evaluated and searched with their own tokenizer and policies for them."""

import json
import random
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from launch.budgets.__main__ import main as budgets
from launch.evaluate.__main__ import main as evaluate
from selective_attention.transformer.interchange import named_tensors
from tests.launch.evaluate.conftest import LENGTH, QUESTIONS, request_rows, write_requests
from tests.support.datasets import SENTENCE, prepare_c4
from tests.support.small_model import make_model
from tests.support.tokenizers import make_tokenizer
from trainer.huggingface.names import theirs
from trainer.import_hf import import_folder

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, an imported Qwen 3 of 2 x LENGTH tokens with its tokenizer, `data` made with that, and `requests`."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "theirs").mkdir()
    tokenizer = make_tokenizer(folder / "theirs")
    model = make_model(vocab_size=352, max_length=2 * LENGTH, num_layers=1, selection="off")
    save_file({theirs(name): x for name, x in named_tensors(model).items()}, folder / "theirs" / "model.safetensors")
    c = model.config
    fields = {"model_type": "qwen3", "vocab_size": c.vocab_size, "num_hidden_layers": 1, "hidden_size": c.d_model}
    fields |= {"num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim}
    fields |= {"intermediate_size": c.mlp_dim, "max_position_embeddings": c.max_length, "rms_norm_eps": 1e-6}
    (folder / "theirs" / "config.json").write_text(
        json.dumps(fields | {"dtype": "float32", "tie_word_embeddings": True})
    )
    import_folder(folder / "theirs", folder / "model")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(SENTENCE.split(), k=40)) for _ in range(200)]
    data = prepare_c4(folder, {"train": texts, "validation": texts[:90]}, tokenizer=tokenizer, record_length=LENGTH)
    data.rename(folder / "data")
    rows = [row for doc, question in enumerate(QUESTIONS[:3]) for row in request_rows(doc, *question)]
    write_requests(folder / "requests" / "words" / "requests.jsonl.gz", rows)
    return folder


def test_tasks_need_no_dataset_where_the_folder_has_its_tokenizer(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    options = ["--checkpoint=model", "--memory-factor=8", "--policy=tova", f"--output={tmp_path}/x.json"]
    evaluate([*options, "--requests=requests", "--tasks=words"])
    full, tova = json.loads((tmp_path / "x.json").read_text())["results"]
    assert (full["budgets"], tova["budgets"], tova["policy"]) == ([2 * LENGTH], [LENGTH // 4], "tova")
    assert full["tasks"]["words"]["metrics"]["acc"]["value"] >= 0
    with pytest.raises(SystemExit, match="2"):
        evaluate(["--checkpoint=model", "--tasks=needle"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("model has a tokenizer, but no text; give a dataset with --data")


def test_budgets_are_found_for_it_and_measured_on_text(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    found = tmp_path / "budgets.json"
    context = f"--context={LENGTH}"  # of the dataset's records; the model's is longer
    search = ["search", "--checkpoint=model", "--data=data", "--policy=tova", "--target-perplexity=9000", context]
    budgets([*search, "--step=16", "--windows=2", "--validation-windows=2", f"--output={found}"])
    said = json.loads(found.read_text())
    assert said["policy"] == "tova" and said["budgets"][0] < LENGTH
    evaluate([f"--budgets={found}", "--tasks=perplexity,needle", "--windows=2", "--limit=1", f"--lengths={LENGTH}"])
    budgets(["generate", f"--budgets={found}", "--prompt=old words fade", "--tokens=3", "--temperature=0"])
    out = capsys.readouterr().out
    assert f"needle/{LENGTH}" in out and "old words fade" in out.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        evaluate(["--checkpoint=model", "--data=data", context, "--memory-factor=2"])
    assert "selective" in capsys.readouterr().err.splitlines()[-1]  # which a standard model has not
