"""What the page says of answers is what was answered."""

import statistics

import pytest

from launch.study.asked import made_up_blocks, question_blocks
from launch.study.claims import NOT_SHOWN, NOT_TESTABLE, SHOWN, verdicts
from launch.study.measure import write_json
from launch.study.page import Table
from launch.study.record import collect
from tests.launch.study.conftest import write_run


def _record(folder):
    return collect([str(folder)], [], "", [])


def _rows(blocks):
    return [row for block in blocks if isinstance(block, Table) for row in block.rows]


def _made_up(folder, variant, seed, wrong, auc):
    """A run that gives so many wrong of 1,000 answers at each of the lengths 64 and 128."""
    run = write_run(folder, variant.replace(",", "-"), variant, seed)
    layers = [] if "standard" in variant else [{"auc": 0.5}, {"auc": auc}]
    lengths = [
        {"length": 64 << place, "answers": 1000, "wrong": count, "sequences": 100, "wrong_sequences": 1, "ideal": 9.0,
         "layers": layers, "held": []}
        for place, count in enumerate(wrong)
    ]  # fmt: skip
    write_json(run["workdir"] / "study/synthetic.json", {"runs/any": {"task": "assignment", "lengths": lengths}})


def test_made_up_tasks_have_the_share_that_solves_them_and_medians(tmp_path):
    selective = ((0, 30), (10, 500), (700, 800))
    for seed, wrong in enumerate(selective, 1):
        _made_up(tmp_path, "assignment", seed, wrong, 0.9 + seed / 100)
        _made_up(tmp_path, "assignment,standard", seed, (900, 900), 0.0)
    ours, theirs = _rows(made_up_blocks(_record(tmp_path)))
    medians = [f"{1 - statistics.median(wrong) / 1000:.2%}" for wrong in zip(*selective, strict=True)]
    assert ours == ["selective, 0.003", "3", "2 of 3", *medians, "0.910, 0.920, 0.930"]
    assert theirs == ["standard, 0.003", "3", "0 of 3", "10.00%", "10.00%", ""]


@pytest.mark.parametrize(
    ("wrong", "auc", "expected"),
    [(0, 0.95, SHOWN), (0, 0.6, NOT_SHOWN), (500, 0.95, NOT_TESTABLE)],
    ids=["solved and told", "solved and not told", "not solved"],
)
def test_only_models_that_solve_a_task_say_what_is_masked(wrong, auc, expected, tmp_path):
    _made_up(tmp_path, "assignment", 1, (wrong, wrong), auc)
    found = {verdict.claim: verdict.verdict for verdict in verdicts(_record(tmp_path))}
    assert found["In variable assignment stale values are masked"] == expected


def test_questions_have_their_chance_accuracy_and_difference_to_a_full_cache(tmp_path):
    run = write_run(tmp_path, "selective", "toy", 1)
    mean = {"value": 0.25, "standard_error": 0.05}
    found = {"chance": 0.1, "metrics": {"acc": mean}, "minus_full_cache": {"bits_per_byte": mean}, "items": {"a": {}}}
    write_json(
        run["workdir"] / "study/tasks.json", {"results": [{"cache": "tova 4.00x", "tasks": {"needle/64": found}}]}
    )
    cells = ["selective-1", "needle/64", "tova 4.00x", "0.100", "0.250 ± 0.050", "+0.250 ± 0.050"]
    assert _rows(question_blocks(_record(tmp_path))) == [cells]
