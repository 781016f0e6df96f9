"""What the page says of answers is what was answered."""

import re
import statistics

import pytest

from launch.commands import InputError
from launch.study.asked import made_up_blocks, question_blocks
from launch.study.claims import NOT_SHOWN, NOT_TESTABLE, SHOWN, verdicts
from launch.study.measure import write_json
from launch.study.page import Figure, Heading, Table, Text
from launch.study.record import collect
from tests.launch.study.conftest import write_run
from trainer.metrics.json_lines import METRICS_FILE


def _record(folder):
    return collect([str(folder)], [], "", [])


def _rows(blocks):
    return [row for block in blocks if isinstance(block, Table) for row in block.rows]


def _layer(auc, stale_masked=0.5):
    return {"auc": auc, "stale_masked": stale_masked, "alive_masked": 0.25, "stale_masked_after": {"n0": 0, "n1": 1}}


def _made_up(folder, variant, seed, wrong, auc, masked=0.5):
    """A run that gives so many wrong of 1,000 answers at each of the lengths 64 and 128, and fewer the more it holds of
    the first.
    """
    run = write_run(folder, variant.replace(",", "-"), variant, seed)
    is_standard = "standard" in variant
    layers = [] if is_standard else [_layer(0.5, 1.0), _layer(auc, masked)]
    held = [
        {"tokens": tokens, "policy": policy, "answers": 100, "wrong": 96 // tokens - seed}
        for tokens in (2, 32)
        for policy in (("oldest",) if is_standard else ("selective", "oldest"))
    ]
    lengths = [
        {"length": 64 << place, "answers": 1000, "wrong": count, "sequences": 100, "wrong_sequences": 1, "ideal": 9.0,
         "age_auc": 0.75, "wrong_after": {"n0": 3, "n1": 0}, "layers": layers, "held": held if place == 0 else []}
        for place, count in enumerate(wrong)
    ]  # fmt: skip
    before = [] if is_standard else [_layer(0.625), _layer(0.625)]
    content = {"runs/any": {"task": variant.partition(",")[0], "lengths": lengths, "untrained": before}}
    write_json(run["workdir"] / "study/synthetic.json", content)
    return run


def test_made_up_tasks_have_the_share_that_solves_them_and_medians(tmp_path):
    selective = ((0, 30), (10, 500), (700, 800))
    for seed, wrong in enumerate(selective, 1):
        _made_up(tmp_path, "assignment", seed, wrong, 0.9 + seed / 100)
        _made_up(tmp_path, "assignment,standard", seed, (900, 900), 0.0)
    ours, theirs = _rows(made_up_blocks(_record(tmp_path)))[:2]
    medians = [f"{1 - statistics.median(wrong) / 1000:.2%}" for wrong in zip(*selective, strict=True)]
    assert ours == ["selective, 0.003", "3", "2 of 3", *medians]
    assert theirs == ["standard, 0.003", "3", "0 of 3", "10.00%", "10.00%"]


def test_accuracy_against_tokens_held_has_every_seed_and_the_perfect_memory(tmp_path):
    for seed in (1, 2):
        _made_up(tmp_path, "assignment", seed, (0, 0), 0.9)
        _made_up(tmp_path, "assignment,standard", seed, (900, 900), 0.0)
    blocks = made_up_blocks(_record(tmp_path))
    rows = {row[0]: row[1:] for row in _rows(blocks)}
    # 47 and 46 of 100 are wrong with 2 tokens, 2 and 1 with 32
    for name in ("selective: selective", "selective: window", "standard: window"):
        assert rows[f"{name}, rate 0.003"] == ["53.0% to 54.0%", "98.0% to 99.0%"]
    (svg,) = (block.svg for block in blocks if isinstance(block, Figure) and block.name == "assignment-0-held")
    assert "a perfect memory holds 9.0" in svg


def test_runs_of_another_number_of_steps_are_not_mixed_in(tmp_path):
    for steps in (300, 500):
        run = _made_up(tmp_path, "assignment", steps, (0, 0), 0.9)
        metrics = run["workdir"] / METRICS_FILE
        metrics.write_text(re.sub(r'("steps": )\d+', rf"\g<1>{steps}", metrics.read_text()))
    headings = [b.text for b in made_up_blocks(_record(tmp_path)) if isinstance(b, Heading) and "assignment" in b.text]
    assert [heading.partition("32, ")[2] for heading in headings] == ["300 steps of 64", "500 steps of 64"]


def test_what_is_masked_stands_beside_what_was_before_training_and_name_by_name(tmp_path):
    _made_up(tmp_path, "assignment", 1, (0, 0), 0.9)
    _made_up(tmp_path, "parity", 1, (500, 0), 0.9)
    blocks = made_up_blocks(_record(tmp_path))
    rows = {row[0]: row[1:] for row in _rows(blocks)}
    numbers = ["0.900", "0.625", "50.0%", "50.0%", "25.0%", "25.0%"]
    assert rows["assignment-1, layer 1"] == [*numbers, "0%, 100%", "3, 0"]
    assert rows["parity-1, layer 1, not solved"] == numbers
    assert "Age alone has an AUC of 0.750" in " ".join(block.text for block in blocks if isinstance(block, Text))


def test_what_an_earlier_version_measured_is_told_and_not_misread(tmp_path):
    run = write_run(tmp_path, "assignment", "assignment", 1)
    write_json(run["workdir"] / "study/synthetic.json", {"runs/any": {"task": "assignment", "lengths": []}})
    with pytest.raises(InputError, match="remove it"):
        _record(tmp_path)


@pytest.mark.parametrize(("masked", "expected"), [(0.95, SHOWN), (0.85, NOT_SHOWN)])
def test_in_parity_every_layer_has_to_mask_what_is_stale_since_age_alone_tells(masked, expected, tmp_path):
    _made_up(tmp_path, "parity", 1, (0, 0), 0.99, masked)
    found = {verdict.claim: verdict.verdict for verdict in verdicts(_record(tmp_path))}
    assert found["In parity all but the last two tokens are masked"] == expected


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
    metrics = {"acc": mean, "bits_per_byte": mean}
    found = {"chance": 0.1, "metrics": metrics, "minus_full_cache": {"bits_per_byte": mean}, "items": {"a": {}}}
    for file, task in (("tasks", "needle/64"), ("tasks-hellaswag", "hellaswag")):
        content = {"results": [{"cache": "tova 4.00x", "tasks": {task: found}}]}
        write_json(run["workdir"] / f"study/{file}.json", content)
    cells = ["tova 4.00x", "0.100", "0.250 ± 0.050", "0.250 ± 0.050", "+0.250 ± 0.050"]
    rows = _rows(question_blocks(_record(tmp_path)))
    assert sorted(rows) == [["selective-1", "hellaswag", *cells], ["selective-1", "needle/64", *cells]]
