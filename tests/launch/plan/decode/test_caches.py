"""What is planned, and what is refused before anything is compiled."""

import dataclasses
import json
from pathlib import Path

import pytest

from inference_budget import POLICIES, Budgets, save_budgets
from launch.plan.decode import caches, command
from launch.plan.decode.command import Asked, plan_decoding
from launch.plan.decode.result import Slice
from launch.slices import find
from selective_attention import Selection, TransformerConfig, export_safetensors
from tests.support.small_model import LENGTH, make_model
from trainer.errors import ConfigError

CONFIG = TransformerConfig.from_width(4, vocab_size=512, max_length=2048)
STANDARD = TransformerConfig.from_width(4, vocab_size=512, max_length=2048, selection=Selection.OFF)
V4 = find("v4-8")


def budgets_file(folder, budgets, context_length=2048, policy="selective"):
    path = folder / f"{policy}.json"
    content = {"format": "inference_budget.Budgets/1", "checkpoint": {"path": "elsewhere", "fingerprint": "0"}}
    path.write_text(json.dumps(content | {"context_length": context_length, "policy": policy, "budgets": budgets}))
    return str(path)


def asked(**changes) -> Asked:
    return Asked(**{"budgets": [], "factors": ["4"], "batch": None, "mesh": {}, "price": 0.0} | changes)


def test_uniform_budgets_are_whole_and_hold_at_least_bos_and_the_current_token():
    slots = {factor: caches.uniform(CONFIG, 2048, factor).tokens for factor in (1, 4, 47, 5000)}
    assert slots == {1: (2048,) * 4, 4: (512,) * 4, 47: (43,) * 4, 5000: (2,) * 4}


def test_full_caches_of_both_models_come_first_and_a_factor_of_1_is_no_other():
    budgets = Budgets((512, 64, 32, 16), 2048)
    made = caches.choices(CONFIG, 2048, [1.0, 16.0], [("found", budgets, "tova")])
    assert [(c.name, c.policy) for c in made[1:]] == [("full", "selective"), ("16x", "selective"), ("found", "tova")]
    assert all(c.config == CONFIG for c in made[1:])
    assert made[0].name == "standard" and made[0].config == STANDARD
    assert made[0].budgets == made[1].budgets == Budgets.full(4, 2048) and made[3].budgets == budgets


def test_a_model_without_selection_is_its_own_baseline():
    budgets = Budgets((512,) * 4, 2048)
    assert [c.name for c in caches.choices(STANDARD, 2048, [1.0], [("found", budgets, "h2o")])] == ["standard", "found"]


MISTAKES = {
    "nothing to plan": (CONFIG, {"factors": []}, "give|needs --budgets=FILE or --memory-factor"),
    "no model": (None, {}, "needs --config, or --budgets=FILE"),
    "a factor below 1": (CONFIG, {"factors": ["0.5"]}, "--memory-factor: 0.5 is below 1"),
    "a factor that is no number": (CONFIG, {"factors": ["4x"]}, "--memory-factor: '4x' is not a number"),
    "a factor of a standard model": (STANDARD, {}, "give --budgets, whose file names one"),
    "a batch that is not divided": (CONFIG, {"batch": 30}, "--batch=30 .* 4 parts; give a multiple of 4"),
    "a batch of none": (CONFIG, {"batch": 0}, "--batch=0"),
    "an axis of training": (CONFIG, {"mesh": {"fsdp": 4}}, "--mesh: .* leave out fsdp"),
    "a mesh of other chips": (CONFIG, {"mesh": {"tensor": 3}}, "mesh tensor=3 does not fit its 4 chips"),
    "a mesh of too few chips": (CONFIG, {"mesh": {"tensor": 2, "data": 1}}, "mesh tensor=2,data=1 does not fit"),
    "heads that are not divided": (
        TransformerConfig.from_width(4, vocab_size=512, max_length=2048, num_kv_heads=2),
        {"mesh": {"tensor": 4}},
        "tensor=4 does not divide num_kv_heads=2",
    ),
    "budgets that are not there": (CONFIG, {"budgets": ["/no/such.json"]}, "/no/such.json: .* cannot be read"),
}


@pytest.mark.parametrize(("config", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found_before_compiling(config, changes, message, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(ConfigError, match=message):
        plan_decoding(config, V4, asked(**changes))


OTHERS = {  # of another model than CONFIG
    "layers": ({"budgets": [64] * 5}, "there are 5 budgets, but the model has 4 layers"),
    "context": ({"budgets": [64] * 4, "context_length": 4096}, "contexts of 4096 tokens; the model was made"),
    "above the context": ({"budgets": [4096] * 4}, "the budget of layer 0 is 4096"),
    "policy": ({"budgets": [64] * 4, "policy": "h2o-per-head"}, "'h2o-per-head' is not defined on a selective model"),
    "thresholds": ({"budgets": [64] * 4, "policy": "forgotten-16-8"}, "has 2 thresholds; give one, or one for each"),
}


@pytest.mark.parametrize(("content", "message"), OTHERS.values(), ids=OTHERS)
def test_budgets_of_another_model_are_refused(tmp_path, content, message):
    path = budgets_file(tmp_path, **content)
    with pytest.raises(ConfigError, match=f"--budgets={path}: .*{message}"):
        plan_decoding(CONFIG, V4, asked(budgets=[path]))


def test_what_is_forgotten_needs_a_model_whose_threshold_is_known_or_one_in_its_name(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(command, "plan", lambda choice, *_: planned.append(choice))
    bounded, unbounded = CONFIG, dataclasses.replace(CONFIG, qk_norm=False)
    for policy, config in (("forgotten", bounded), ("forgotten-16", bounded), ("forgotten-16-8-8-8", unbounded)):
        path = budgets_file(tmp_path, [64] * 4, policy=policy)
        plan_decoding(config, V4, asked(budgets=[path], factors=[]))
        (choice,) = (choice for choice in planned if choice.policy == policy)
        assert (choice.budgets.tokens, choice.config) == ((64,) * 4, config)
    path = budgets_file(tmp_path, [64] * 4, policy="forgotten")
    with pytest.raises(ConfigError, match=f"--budgets={path}: .*give a threshold in nats, such as forgotten-16"):
        plan_decoding(unbounded, V4, asked(budgets=[path], factors=[]))


def test_without_a_config_the_model_is_that_of_the_budgets(tmp_path):
    model, budgets = make_model(), Budgets((8, 4), LENGTH)
    export_safetensors(model, tmp_path / "model")
    save_budgets(tmp_path / "its.json", model, budgets, POLICIES["tova"], checkpoint=tmp_path / "model")
    config, found, policy = caches.read_budgets(str(tmp_path / "its.json"), None)
    assert config.parameter_counts() == model.config.parameter_counts() and (found, policy) == (budgets, "tova")
    export_safetensors(make_model(seed=1), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"its\.json: these budgets were found for another model"):
        caches.read_budgets(str(tmp_path / "its.json"), None)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    path = budgets_file(tmp_path, [64] * 4)
    with pytest.raises(ConfigError, match=f"--budgets={path}: elsewhere holds no model"):
        plan_decoding(None, V4, asked(budgets=[path]))


def test_a_file_that_is_called_as_a_full_cache_is_another_column(tmp_path, monkeypatch):
    path = Path(budgets_file(tmp_path, [64] * 4)).rename(tmp_path / "standard.json")
    planned = []
    monkeypatch.setattr(command, "plan", lambda choice, *_: planned.append(choice.name))
    plan_decoding(CONFIG, V4, asked(budgets=[str(path)], factors=[]))
    assert sorted(planned) == ["full", "standard", "standard.json"]


def test_the_picture_says_where_chips_share_heads(monkeypatch):
    titles = []
    monkeypatch.setattr(command.chart, "draw", lambda plans, title, path: titles.append(title))
    for tensor in (1, 4):
        command.Decoding([], Slice("v4-8", 4, tensor), CONFIG, 2048, "bfloat16", []).draw("decoding.png")
    assert [title.partition(", on ")[2] for title in titles] == ["v4-8", "v4-8, heads over 4 chips"]
