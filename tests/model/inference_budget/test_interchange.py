"""What budgets.json keeps, and which files are refused."""

import dataclasses
import importlib
import json
import sys

import pytest

from inference_budget import (
    POLICIES,
    Budgets,
    BudgetsError,
    Random,
    SinksAndWindow,
    find_policy,
    load_budgets,
    model_fingerprint,
    policy_name,
    save_budgets,
)
from inference_budget.interchange import BudgetsFile, budgets_of, read_budgets_file, write_budgets_file
from selective_attention import TransformerConfig
from selective_attention.transformer.config import MACHINE
from tests.support.small_model import LENGTH, make_model

CONTENT = {
    "checkpoint": {"path": "/runs/one", "fingerprint": "a" * 64},
    "context_length": 64,
    "budgets": [8, 4],
    "policy": "tova",
}
OWN_POLICY = """
import dataclasses
from inference_budget import OldestFirst

OWN = OldestFirst()

@dataclasses.dataclass(frozen=True)
class NewestFirst(OldestFirst):
    name = "newest"
    def priority(self, held):
        return -super().priority(held)

class Nothing: pass

class Thawed(OldestFirst):
    __hash__ = None

@dataclasses.dataclass(frozen=True)
class Asking(OldestFirst):
    sinks: int
"""


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


def test_a_way_to_compute_that_a_later_version_adds_leaves_the_fingerprint():
    @dataclasses.dataclass(frozen=True)
    class Later(TransformerConfig):
        precise: bool = dataclasses.field(default=False, metadata=MACHINE)

    model = make_model()
    fingerprint = model_fingerprint(model)
    model.config = Later(**dataclasses.asdict(model.config), precise=True)
    assert model_fingerprint(model) == fingerprint


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
def test_a_file_that_says_what_cannot_be_is_refused(changes, tmp_path):
    write_budgets_file(tmp_path / "budgets.json", CONTENT | changes)
    with pytest.raises(BudgetsError, match=r" is .*, not .*; make it with `search`"):
        read_budgets_file(tmp_path / "budgets.json", BudgetsFile)


@pytest.fixture
def newest(tmp_path, monkeypatch):
    """A module with a policy of one's own, and with what is none."""
    (tmp_path / "newest_first.py").write_text(OWN_POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("newest_first")
    del sys.modules["newest_first"]


def test_a_policy_of_one_s_own_is_found_again_by_its_module_and_class(newest, tmp_path):
    model, path = make_model(), tmp_path / "budgets.json"
    save_budgets(path, model, Budgets((3, 9), LENGTH), newest.NewestFirst(), checkpoint="/runs/one")
    assert json.loads(path.read_text())["policy"] == "newest_first:NewestFirst"
    assert load_budgets(path, model)[1] == newest.NewestFirst()


def test_budgets_of_a_policy_whose_module_was_changed_are_refused(newest, tmp_path):
    model, path = make_model(), tmp_path / "budgets.json"
    save_budgets(path, model, Budgets((3, 9), LENGTH), newest.NewestFirst(), checkpoint="/runs/one")
    with open(newest.__file__, "a") as module:
        module.write("# changed\n")
    with pytest.raises(
        BudgetsError, match=r"the module of newest_first:NewestFirst was changed since .*; bring it back"
    ):
        load_budgets(path, model)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_called_as_files_call_it(name):
    assert policy_name(find_policy(name)) == name


@pytest.mark.parametrize("policy", [SinksAndWindow(sinks=8), Random(seed=1)])
def test_a_policy_that_no_name_stands_for_is_not_saved_as_another(policy, tmp_path):
    with pytest.raises(BudgetsError, match=r"no name stands for \w+\(s\w+=\d\) in a file"):
        save_budgets(tmp_path / "x.json", make_model(), Budgets((3, 9), LENGTH), policy, checkpoint="/runs/one")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lru", "there is no policy 'lru'; take selective, h2o, .*, or a class of your own as module:Class"),
        ("nowhere:Class", "'nowhere:Class': No module named 'nowhere'; run from the module's folder, or name that in"),
        (":Class", "':Class': .*; run from the module's folder, or name that in PYTHONPATH"),
        ("newest_first:Newest", "newest_first has no class 'Newest'; name one as module:Class"),
        ("newest_first:OWN", "newest_first has no class 'OWN'; name one as module:Class"),
        ("newest_first:Nothing", "it lacks name, keeps_score, per_head, shrinks, priority, forgets, observe; add"),
        ("newest_first:Thawed", "unhashable type: 'Thawed'; write a frozen dataclass whose fields all have defaults"),
        ("newest_first:Asking", "'sinks'; write a frozen dataclass whose fields all have defaults"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(newest, name, message):
    with pytest.raises(BudgetsError, match=message):
        find_policy(name)
