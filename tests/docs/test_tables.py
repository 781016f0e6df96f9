"""The stored plans of the experiments: each step once, none that is there again, and those of no config forgotten."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from configs import experiments
from launch.slices import find
from tests.support import ROOT


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """docs/tables.py with a planner that says how many it has planned, and a file of its own."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.planned = []

    def output(command, allowed=(0,)):
        *_, config, file = shlex.split(command)
        name = config.removeprefix("--config=")
        module.planned.append(name)
        plan = {"topology": experiments.load(name).mesh.topology, "fits": "d28" not in name}
        plan["chips"] = find(plan["topology"]).num_chips
        if plan["fits"]:
            plan |= {"headroom": 0.25, "step_ms": 100.0 + len(module.planned)}
        assert 3 in allowed
        Path(file.removeprefix("--json=")).write_text(json.dumps(plan))

    monkeypatch.setattr(module, "_output", output)
    monkeypatch.setattr(experiments, "PLANS_FILE", tmp_path / "plans.json")
    return module


def test_every_step_is_planned_once_and_what_is_there_is_not_planned_again(tables):
    experiments.PLANS_FILE.write_text(json.dumps({"of no config": {}}))
    tables.plan_experiments("abc", ["d8"])
    first = list(tables.planned)
    assert first and all(":d8" in name for name in first)
    tables.plan_experiments("def", [])
    plans = experiments.read_plans()
    on_slices = [name for name in experiments.CONFIGS if "synthetic" not in name]
    assert plans.keys() == {experiments.step_key(experiments.load(name)) for name in on_slices}
    assert len(tables.planned) == len(plans) and tables.planned[: len(first)] == first
    assert "configs/c4.py:d12" in tables.planned and not any("lr" in name or "lm1b" in name for name in tables.planned)
    of_d8 = plans[experiments.step_key(experiments.load("configs/c4.py:d8"))]
    assert of_d8 == {
        "topology": "v4-16",
        "chips": 8,
        "fits": True,
        "headroom": 0.25,
        "step_ms": 100.0 + first.index("configs/c4.py:d8") + 1,
        "commit": "abc",
        **dict(zip(("price", "price_date"), find("v4-16").list_price, strict=True)),
    }
    tables.plan_experiments("ghi", [])
    assert len(tables.planned) == len(plans)
    of_d28 = plans[experiments.step_key(experiments.load("configs/c4.py:d28"))]
    assert (of_d28["fits"], of_d28["commit"]) == (False, "def")
