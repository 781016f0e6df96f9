"""What the commands write, resume from and refuse."""

import json

import pytest

from launch.budgets.__main__ import main
from launch.budgets.inputs import model_fingerprint
from launch.budgets.result import Journal, budgets_of, read_json, write_json
from tests.support.small_model import make_model

CONTENT = {
    "checkpoint": {"path": "/runs/one", "fingerprint": "a" * 64},
    "context_length": 64,
    "budgets": [8, 4],
    "policy": "tova",
}


def test_budgets_survive_the_file(tmp_path):
    write_json(tmp_path / "budgets.json", CONTENT)
    budgets, policy = budgets_of(read_json(tmp_path / "budgets.json"), "a" * 64)
    assert (budgets.tokens, budgets.context_length, policy.name) == ((8, 4), 64, "tova")


def test_budgets_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"found for another model, /runs/one \(aaaaaaaaaaaa, not bbbbbbbbbbbb\)"):
        budgets_of(CONTENT, "b" * 64)


def test_a_fingerprint_is_of_what_a_model_computes_and_not_of_how():
    fingerprint = model_fingerprint(make_model())
    assert model_fingerprint(make_model(remat="block", attention="xla")) == fingerprint
    for changed in (make_model(seed=1), make_model(rotary_base=5e3), make_model(selection="off")):
        assert model_fingerprint(changed) != fingerprint


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "budgets.json").write_text(json.dumps(CONTENT))
    with pytest.raises(ValueError, match=r"does not say that its format is 'inference_budget\.Budgets/1'"):
        read_json(tmp_path / "budgets.json")


def test_a_journal_keeps_what_was_measured_but_not_a_torn_last_line(tmp_path):
    path = tmp_path / "journal"
    Journal(path, {"policy": "tova"})[8, 4] = 1.25, 1.5
    with path.open("a") as stream:
        stream.write("[[8, 2], 1.")
    again = Journal(path, {"policy": "tova"})
    assert dict(again) == {(8, 4): (1.25, 1.5)}
    again[2, 2] = 3.0, 3.5
    assert dict(Journal(path, {"policy": "tova"})) == {(8, 4): (1.25, 1.5), (2, 2): (3.0, 3.5)}


def test_a_journal_of_another_search_is_refused(tmp_path):
    Journal(tmp_path / "journal", {"policy": "tova"})[8, 4] = 1.25, 1.5
    with pytest.raises(ValueError, match="is of another search; remove it, or give another --output"):
        Journal(tmp_path / "journal", {"policy": "h2o"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--budgets", "nowhere.json"], "error: nowhere.json cannot be read"),
        (
            ["search", "--checkpoint=nowhere", "--data=nowhere", "--target-perplexity=9", "--output=x.json"],
            "error: nowhere holds no model: neither config.json nor a training run's checkpoints",
        ),
        (["search", "--checkpoint=a", "--data=b", "--target-perplexity=1", "--output=x"], "above 1, not 1"),
        (["search", "--checkpoint=a", "--data=b", "--output=x"], "--target-checkpoint --target-perplexity"),
        (["search", "--policy=lru"], "invalid choice: 'lru'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
