"""The README's examples run as they are printed, one after the other."""

import pathlib
import re

from small_model import LENGTH, make_model

from inference_budget import POLICIES, Budgets, load_budgets, save_budgets
from selective_attention import export_safetensors

README = pathlib.Path(__file__).parents[3] / "model" / "inference_budget" / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model(max_length=32)
    export_safetensors(model, "export")
    save_budgets("budgets.json", model, Budgets((3, 9), LENGTH), POLICIES["selective"], checkpoint="export")
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    for example in examples:
        exec(example, names)
    assert [len(continuation) for continuation in names["continuations"]] == [8]
    assert load_budgets("budgets.json", model) == (names["best"].budgets, POLICIES["selective"])


def test_the_table_of_policies_is_complete():
    table = README.read_text().partition("## Policies")[2].partition("\n##")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(.*?)`", row)) == sorted(POLICIES)
