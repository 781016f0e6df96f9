"""Accuracy by length and what is forgotten, compared with a computation token by token."""

import json
import sys
from collections import Counter
from subprocess import run

import numpy as np
import pytest

from data import TaskEvalBatches, find_task
from inference_budget import Budgets, BudgetsError, Request, Scorer, find_policy
from launch.synthetic import MASKED, auc, measure, measure_held
from tests.support import ROOT
from tests.support.small_model import STANDARD, make_model


def test_auc_is_the_chance_that_a_positive_has_the_higher_score():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60) / 4, rng.random(60) < 0.3  # with many ties
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(np.arange(5.0), np.arange(5) > 2) == 1 and auc(np.zeros(5), np.arange(5) > 2) == 0.5
    assert np.isnan(auc(scores, np.zeros(60, bool)))


@pytest.mark.parametrize("name", ["assignment", "parity"])
def test_a_measurement_is_what_a_count_token_by_token_gives(name):
    task, length, sequences = find_task(name, names=3, values=5, queries=2), 20, 70
    model = make_model()
    batch = TaskEvalBatches(task, context_length=length, batch_size=1).read(np.arange(sequences))
    best = np.asarray(model(batch["inputs"])).argmax(axis=-1)
    f = np.asarray(model.selection_masks(batch["inputs"]))
    answers, wrong, wrong_sequences = 0, 0, 0
    scores: list[list[float]] = [[] for _ in f]
    stale: list[bool] = []
    ages: list[int] = []
    wrong_after: dict[str, int] = Counter()
    before: list[int] = []
    for row, (inputs, targets) in enumerate(zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True)):
        places = [n for n, target in enumerate(targets) if target > 0]
        errors = sum(best[row, n] != targets[n] for n in places)
        for n in places:
            wrong_after[task.pieces[inputs[n]]] += best[row, n] != targets[n]
        answers, wrong, wrong_sequences = answers + len(places), wrong + errors, wrong_sequences + (errors > 0)
        if name == "assignment":
            query = places[0]  # the position of the first name that is asked for
            named = [(inputs[n - 1], n) for n in range(2, query - 1, 2)]
            tokens = {n: any(later > n for name_, later in named if name_ == own) for own, n in named}
        else:
            query = places[-1]  # the position of the last bit
            tokens = {n: n < query - 1 for n in range(1, query)}
        stale += tokens.values()
        ages += [query - n for n in tokens]
        before += [inputs[n - 1] for n in tokens]
        for layer in range(len(f)):
            scores[layer] += [f[layer, row, query, n] for n in tokens]
    found = measure(model, task, length, sequences)
    assert (found.answers, found.wrong, found.sequences, found.wrong_sequences) == (
        *(answers, wrong, sequences, wrong_sequences),
    )
    assert len(found.layers) == 2 and found.wrong_after == wrong_after and sum(wrong_after.values()) == wrong
    is_stale = np.array(stale)
    for layer, own in zip(found.layers, map(np.array, scores), strict=True):
        # Near ties, and near the threshold, the order of a sum may decide.
        assert layer.auc == pytest.approx(auc(own, is_stale), abs=1e-3)
        assert layer.stale_masked == pytest.approx(np.mean(own[is_stale] > MASKED), abs=2e-3)
        assert layer.alive_masked == pytest.approx(np.mean(own[~is_stale] > MASKED), abs=2e-3)
        after = {task.pieces[token] for token, is_stale in zip(before, stale, strict=True) if is_stale}
        assert set(layer.stale_masked_after) == after
        for token in {token for token in before if task.pieces[token] in after}:
            of_token = own[is_stale & (np.array(before) == token)]
            assert layer.stale_masked_after[task.pieces[token]] == pytest.approx(np.mean(of_token > MASKED), abs=2e-2)
    assert found.age_auc == pytest.approx(auc(np.array(ages), is_stale))
    assert any(layer.stale_masked > 0.1 for layer in found.layers)
    alive = [not own for own in stale]
    assert found.ideal == pytest.approx(2 + sum(alive) / sequences)


def test_a_model_without_selection_forgets_nothing_and_other_lengths_than_its_own_are_measured():
    found = measure(make_model(**STANDARD), find_task("parity", names=1, values=2, queries=1), 96, 64)
    assert found.layers == [] and found.length == 96 and found.answers > 64 * 24


def test_a_workdir_of_no_run_is_one_line(tmp_path):
    command = [sys.executable, "-m", "launch.synthetic", str(tmp_path), f"--json={tmp_path}/out.json"]
    done = run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}: there is no checkpoint")
    assert done.stderr.count("\n") == 1


def test_a_cache_that_holds_everything_answers_as_the_parallel_pass():
    task, length, sequences = find_task("assignment", names=3, values=5, queries=2), 20, 40
    model = make_model()
    batch = TaskEvalBatches(task, context_length=length, batch_size=1).read(np.arange(sequences))
    best, asked = np.asarray(model(batch["inputs"])).argmax(axis=-1), batch["targets"] > 0
    full = measure_held(model, task, length, sequences, length, "selective")
    assert (full.answers, full.wrong) == (asked.sum(), np.sum(asked & (best != batch["targets"])))
    with pytest.raises(BudgetsError, match="the budget of layer 0 is 1"):
        measure_held(model, task, length, sequences, 1, "selective")


def test_a_small_cache_answers_as_decoding_with_it_token_by_token():
    task, length, sequences = find_task("assignment", names=3, values=2, queries=2), 20, 70  # more than one batch
    model = make_model(max_length=length, vocab_size=len(task.pieces))  # right by chance now and then
    batch = TaskEvalBatches(task, context_length=length, batch_size=1).read(np.arange(sequences))
    requests = [
        Request(inputs[: place + 1].tolist(), [int(targets[place])])
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True)
        for place in np.flatnonzero(targets > 0)
    ]
    scores = Scorer(model, Budgets((4, 4), length), find_policy("selective")).score(requests)
    held = measure_held(model, task, length, sequences, 4, "selective")
    assert (held.answers, held.wrong) == (len(scores), sum(not score.greedy for score in scores))
    assert held.wrong != measure_held(model, task, length, sequences, length, "selective").wrong


@pytest.mark.slow
def test_the_command_measures_a_run_and_writes_the_same_as_json(tmp_path):
    sizes = {"steps": 3, "context_length": 32, "batch_size": 8, "model.num_layers": 1, "model.width": 1}
    sizes |= {"eval.batches": 1, "mesh.data": -1, "optimizer.warmup_steps": 1}
    train = ["-m", "trainer", "--config=configs/synthetic.py:assignment", f"--workdir={tmp_path}/run"]
    flags = [f"--config.{name}={value}" for name, value in sizes.items()]
    assert run([sys.executable, *train, *flags], cwd=ROOT).returncode == 0
    measured = [
        "-m",
        "launch.synthetic",
        f"{tmp_path}/run",
        "--sequences=8",
        "--held=4,32",
        "--policy=selective,oldest",
        f"--json={tmp_path}/out.json",
    ]
    done = run([sys.executable, *measured], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert [at["length"] for at in result["lengths"]] == [32, 64, 128] and result["task"] == "assignment"
    assert all(f"{at['answers']:,}" in done.stdout for at in result["lengths"])
    held = [[(cache["tokens"], cache["policy"]) for cache in at["held"]] for at in result["lengths"]]
    assert held == [[(4, "selective"), (4, "oldest"), (32, "selective"), (32, "oldest")], [], []]
    assert len(result["untrained"]) == len(result["lengths"][0]["layers"]) == 1
    other = [sys.executable, "-m", "launch.evaluate", f"--checkpoint={tmp_path}/run", "--tasks=perplexity"]
    done = run(other, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "trained on the task assignment; measure it with launch.synthetic" in done.stderr
