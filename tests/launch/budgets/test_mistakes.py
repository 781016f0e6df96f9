"""What a user does wrong with the commands: one line says what and what to do, and the exit code is 2."""

import json
import shutil
from pathlib import Path

import pytest

from data import open_dataset
from inference_budget import POLICIES, Budgets, save_budgets
from launch.budgets.__main__ import main
from selective_attention import export_safetensors
from tests.support.datasets import prepare_c4
from tests.support.small_model import make_model

LENGTH = 32  # of the model's context; the records of the dataset are twice as long


@pytest.fixture(scope="module")
def folder(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, `export` and `tiny`, budgets for the first, its dataset, and another dataset."""
    folder = tmp_path_factory.mktemp("mistakes")
    model = make_model(vocab_size=300, max_length=LENGTH, num_layers=1)
    export_safetensors(model, folder / "export")
    export_safetensors(make_model(num_layers=1), folder / "tiny")
    save_budgets(folder / "saved.json", model, Budgets((9,), LENGTH), POLICIES["selective"], checkpoint="export")
    content = json.loads((folder / "saved.json").read_text())
    content["data"] = {"path": "data", "fingerprint": open_dataset(dataset_path).manifest.fingerprint}
    (folder / "budgets.json").write_text(json.dumps(content))
    (folder / "fraction.json").write_text(json.dumps(content | {"budgets": [4.9]}))
    (folder / "long.json").write_text(json.dumps(content | {"context_length": 64}))
    shutil.copytree(dataset_path, folder / "data")
    text = "another text than the one that the budgets were found on, every time with one more number: "
    texts = [text + " ".join(map(str, range(n))) for n in range(200)]
    other = tmp_path_factory.mktemp("other")
    prepare_c4(other, {"train": texts, "validation": texts[150:]}, vocab_size=300, record_length=64)
    (other / "prepared").rename(folder / "other")
    return folder


SEARCH = ["search", "--checkpoint=export", "--data=data", "--target-perplexity=9", "--output=found.json"]
EVALUATE = ["evaluate", "--budgets=budgets.json"]
GENERATE = ["generate", "--budgets=budgets.json", "--prompt=the mask of a token"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*SEARCH, "--policy=lru"], "there is no policy 'lru'; take selective, h2o, "),
        ([*SEARCH, "--policy=no.x:Y"], "policy 'no.x:Y': No module named 'no'; run from the module's folder, or"),
        ([*SEARCH, "--policy=re:Y"], "policy 're:Y': re has no class 'Y'; name one as module:Class"),
        ([*SEARCH, "--policy=enum:Enum"], "policy 'enum:Enum' is no EvictionPolicy: it lacks "),
        ([*SEARCH, "--target-perplexity=1"], "argument --target-perplexity: a perplexity is above 1, not 1"),
        (SEARCH[:3] + SEARCH[4:], "one of the arguments --target-checkpoint --target-perplexity is required"),
        ([*SEARCH, "--checkpoint=nowhere"], "nowhere holds no model: neither config.json nor a training run's"),
        (
            [*SEARCH, "--checkpoint=tiny"],
            "data has 300 different tokens, the model 40; give the dataset that the model",
        ),
        ([*SEARCH, "--context=100000"], "--context=100000: the model was made for contexts of 32 tokens; give at most"),
        ([*SEARCH, "--context=64"], "--context=64: the model was made for contexts of 32 tokens; give at most that"),
        ([*SEARCH, "--data=gs://bucket/c4"], "gs://bucket/c4 is not a folder on this machine; mount the bucket"),
        ([*SEARCH, "--context=24"], "a context of 24 tokens does not divide this dataset's records of 64"),
        ([*SEARCH, "--first-step=32"], "steps must be from 1 to 31, the first at least the last; got 32 and 1"),
        ([*SEARCH, "--output=no/x"], "--output=no/x: there is no folder no; make it"),
        ([*SEARCH, "--output=data"], "--output=data is a folder; give a file in it"),
        ([*SEARCH, "--output=/proc/x"], "--output=/proc/x cannot be written: "),
        (["report", "budgets.json", "--output=data"], "--output=data is a folder; give a file in it"),
        (["report", "budgets.json", "--output=/proc/x"], "--output=/proc/x cannot be written: "),
        (["report", "nowhere.json", "--output=x"], "nowhere.json cannot be read: No such file or directory; give a"),
        (["evaluate", "--budgets=nowhere.json"], "nowhere.json cannot be read: No such file or directory; give a"),
        (["evaluate", "--budgets=data"], "data cannot be read: Is a directory; give a file of `search`"),
        ([*GENERATE, "--prompt=\udcff"], "the prompt is not UTF-8 ("),
        (["evaluate", "--budgets=fraction.json"], "budgets[0] is 4.9, not a whole number; make it with"),
        (["evaluate", "--budgets=long.json"], "windows of 64 tokens; the model was made for 32"),
        (["evaluate", "--budgets=saved.json"], "saved.json names no dataset; give --data"),
        ([*EVALUATE, "--data=other"], "other is another dataset than the one that the budgets were found on"),
        ([*EVALUATE, "--checkpoint=tiny"], "these budgets were found for another model, export"),
        ([*EVALUATE, "--split=test"], "data has no split 'test'; it has train, validation"),
        ([*GENERATE, "--data=other"], "other is another dataset than the one that the budgets were found on"),
        ([*GENERATE, "--budgets=long.json"], "budgets for contexts of 64 tokens; the model was made for at most 32"),
        ([*GENERATE, "--prompt="], "the prompt is empty; give --prompt, or text on standard input"),
        ([*GENERATE, "--tokens=32"], "num_tokens must be from 1 to "),
        (
            [*GENERATE, f"--prompt={'old words ' * 50}"],
            "tokens is too long: the model was made for 32, and at least one",
        ),
        ([*GENERATE, "--tokens=4", "--top-k=301"], "top_k must be from 1 to vocab_size=300, got 301"),
        ([*GENERATE, "--tokens=4", "--temperature=-1"], "temperature must not be negative, got -1.0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    said = capsys.readouterr()
    assert exit_info.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and line in said.err, said.err
    assert sorted(folder.iterdir()) == before  # nothing is left behind


def test_what_is_wrong_with_a_policy_s_code_is_no_mistake_of_the_command(folder, tmp_path, monkeypatch):
    (tmp_path / "askew.py").write_text(
        "from inference_budget import OldestFirst\n"
        "class Askew(OldestFirst):\n"
        "    name = 'askew'\n"
        "    def priority(self, held):\n"
        "        raise ValueError('askew')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="askew"):
        main([*SEARCH, "--policy=askew:Askew", f"--output={tmp_path}/found.json"])
