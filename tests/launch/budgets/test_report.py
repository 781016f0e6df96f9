"""The page about searches, read as text; how it looks is for eyes."""

import copy
import math
import re

import pytest

from inference_budget.interchange import read_budgets_file
from launch.budgets.report import table, write_report
from launch.budgets.result import SearchFile


@pytest.fixture
def found(folder):
    """A search for perplexity 70 of a model that is called as its policy."""
    content = copy.deepcopy(read_budgets_file(folder / "budgets.json", SearchFile))
    content["checkpoint"]["path"] = "/runs/selective"
    content["search"]["target_perplexity"] = 70.0
    return content


def page_of(tmp_path, *searches):
    write_report(searches, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_model_that_is_called_as_its_policy_is_named_once(found):
    assert table([found])[1][0] == "selective"


def test_a_chart_says_its_target_and_its_axes_in_round_numbers(found, tmp_path):
    page = page_of(tmp_path, found)
    assert "target 70.00" in page and ">perplexity</text>" in page and ">memory factor: " in page
    ticks = [float(tick) for tick in re.findall(r">([0-9.]+)</text>", page)]
    assert ticks and all(tick == round(tick) for tick in ticks)


def test_a_row_can_be_read_without_its_headings_where_a_phone_has_no_room_for_them(found, tmp_path):
    assert "<td data-heading='factor found'>8.00" in page_of(tmp_path, found)


def test_what_misses_the_target_by_far_does_not_flatten_the_rest(found, tmp_path):
    found["curve"].append(found["curve"][-1] | {"perplexity": 5e4, "nll": math.log(5e4)})
    page = page_of(tmp_path, found)
    assert max(float(tick) for tick in re.findall(r">([0-9.]+)</text>", page)) < 200


def test_budgets_say_what_found_them(found, tmp_path):
    found["chosen"] = "uniform"
    assert "<h4>selective: 8.00x, uniform budgets</h4>" in page_of(tmp_path, found)
