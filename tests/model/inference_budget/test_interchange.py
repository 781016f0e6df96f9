"""What budgets.json keeps, and which files are refused."""

import json

import pytest

from inference_budget import POLICIES, Budgets, BudgetsError, load_budgets, model_fingerprint, save_budgets
from inference_budget.interchange import BudgetsFile, budgets_of, read_budgets_file, write_budgets_file
from tests.support.small_model import LENGTH, make_model

CONTENT = {
    "checkpoint": {"path": "/runs/one", "fingerprint": "a" * 64},
    "context_length": 64,
    "budgets": [8, 4],
    "policy": "tova",
}


def test_budgets_survive_the_file(tmp_path):
    write_budgets_file(tmp_path / "budgets.json", CONTENT)
    budgets, policy = budgets_of(read_budgets_file(tmp_path / "budgets.json", BudgetsFile), "a" * 64)
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
        read_budgets_file(tmp_path / "budgets.json", BudgetsFile)


def test_budgets_that_were_saved_are_loaded_for_the_same_model_alone(tmp_path):
    model, path = make_model(), tmp_path / "budgets.json"
    save_budgets(path, model, Budgets((3, 9), LENGTH), POLICIES["h2o"], checkpoint="/runs/one")
    assert load_budgets(path, model) == (Budgets((3, 9), LENGTH), POLICIES["h2o"])
    with pytest.raises(BudgetsError, match="found for another model, /runs/one"):
        load_budgets(path, make_model(seed=1))


@pytest.mark.parametrize("changes", [{"budgets": 8}, {"budgets": ["a"]}, {"context_length": None}, {"checkpoint": 1}])
def test_a_file_that_says_what_cannot_be_is_refused(changes):
    with pytest.raises(BudgetsError, match=r"lacks, or does not know|must be a whole number"):
        budgets_of(CONTENT | changes, "a" * 64)
