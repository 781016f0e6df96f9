"""Made-up tasks: an independent solver finds every answer, trivial rules do not, and each sequence is its index's."""

import random
from collections import Counter

import numpy as np
import pytest

from data import DataError, TaskEvalBatches, TaskTrainBatches, find_task

SIZES = {"names": 5, "values": 7, "queries": 4}
NAMES = ("assignment", "parity")


def make(name, length=48, held_out=False, batch_size=16, seed=0):
    task = find_task(name, **SIZES)
    if held_out:
        return TaskEvalBatches(task, context_length=length, batch_size=batch_size)
    return TaskTrainBatches(task, context_length=length, batch_size=batch_size, seed=seed)


def sequences(source, count):
    """Of each sequence: its pieces behind BOS, and where its answers are."""
    rows = source.read(np.arange(count))
    for inputs, targets in zip(rows["inputs"].tolist(), rows["targets"].tolist(), strict=True):
        assert inputs[0] == 1
        length = next((n for n, target in enumerate(targets) if target == 0), len(targets))
        tokens = [*inputs[1:], targets[-1]][:length]
        assert set(targets[length:]) <= {0} and set(inputs[length + 1 :]) <= {0}
        answers = [n for n, target in enumerate(targets[:length]) if target != -1]
        assert all(targets[n] == tokens[n] for n in answers)
        yield [source.task.pieces[token] for token in tokens], answers


def tokens_of(source, count):
    rows = source.read(np.arange(count))
    return np.concatenate([rows["inputs"][:, 1:], np.maximum(rows["targets"][:, -1:], 0)], axis=1)


def assignments_of(pieces):
    """(name, value) of each assignment before the first question."""
    told = pieces[: pieces.index("?")]
    return list(zip(told[::2], told[1::2], strict=True))


@pytest.mark.parametrize("length", [16, 17, 48, 200])
def test_a_solver_that_reads_the_assignments_knows_every_answer(length):
    for pieces, answers in sequences(make("assignment", length), 300):
        memory = {}
        for name, value in assignments_of(pieces):
            assert memory.get(name) != value and name[0] == "n" and value[0] == "v"
            memory[name] = value
        end = pieces.index("?")
        asked = [pieces[n : n + 3] for n in range(end, len(pieces), 3)]
        assert len(asked) == SIZES["queries"]
        assert all(sign == "?" and memory[name] == value for sign, name, value in asked)
        assert answers == [end + 3 * n + 2 for n in range(len(asked))]


@pytest.mark.parametrize("length", [16, 17, 48, 200])
def test_a_solver_that_counts_ones_knows_every_result(length):
    for pieces, answers in sequences(make("parity", length), 300):
        ones = 0
        for bit, result in zip(pieces[::2], pieces[1::2], strict=True):
            ones += int(bit)
            assert result == ("odd" if ones % 2 else "even")
        assert answers == list(range(1, len(pieces), 2))


def test_trivial_rules_are_about_as_good_as_chance():
    rng = random.Random(0)
    right, chances, queries = Counter(), 0.0, 0
    for pieces, answers in sequences(make("assignment", 60), 2000):
        told = assignments_of(pieces)
        names = {name for name, _ in told}
        common = Counter(value for _, value in told).most_common(1)[0][0]
        for n in answers:
            name, value = pieces[n - 1], pieces[n]
            own = [v for other, v in told if other == name]
            queries += 1
            chances += 1 / len(names) + (1 - 1 / len(names)) / SIZES["values"]
            right["any value"] += value == f"v{rng.randrange(SIZES['values'])}"
            right["the last value"] += value == told[-1][1]
            right["the most frequent"] += value == common
            right["the name's first"] += len(own) > 1 and value == own[0]
            right["one of the name's stale"] += len(own) > 1 and value == rng.choice(own[:-1])
    accuracy = {rule: count / queries for rule, count in right.items()}
    assert accuracy["any value"] == pytest.approx(1 / SIZES["values"], abs=0.02)
    assert accuracy["the last value"] == pytest.approx(chances / queries, abs=0.02)
    assert max(accuracy.values()) < 0.35


def test_in_parity_neither_a_constant_nor_the_result_before_is_better_than_a_coin():
    constant, copied, total = 0, 0, 0
    for pieces, _ in sequences(make("parity"), 1000):
        results = pieces[1::2]
        constant += results.count("even")
        copied += sum(a == b for a, b in zip(["even", *results], results, strict=False))
        total += len(results)
    assert constant / total == pytest.approx(0.5, abs=0.02) and copied / total == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_differ_and_a_longer_context_has_longer_sequences(name):
    short, long = ([len(pieces) for pieces, _ in sequences(make(name, length), 200)] for length in (64, 130))
    assert len(set(short)) > 8 and max(short) <= 64 < min(long) + 1 and max(long) > 120


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_depends_on_nothing_but_task_seed_and_its_number(name):
    source = make(name)
    whole = source.rows(3, range(16))
    for other in (source.rows(3, [5, 2]), make(name, batch_size=8).rows(6, [5, 2])):
        for array, rows in whole.items():
            np.testing.assert_array_equal(other[array], rows[[5, 2]])
    assert not np.array_equal(make(name, seed=1).rows(3, range(16))["inputs"], whole["inputs"])
    assert not np.array_equal(source.rows(4, range(16))["inputs"], whole["inputs"])
    ours, theirs = (make(name, held_out=True, seed=seed).rows(0, range(16)) for seed in (0, 1))
    np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])


@pytest.mark.parametrize("name", NAMES)
def test_training_and_validation_share_no_sequence(name):
    """Of contexts so short that they would, if each were drawn by itself."""
    drawn = [{tuple(pieces) for pieces, _ in sequences(make(name, 16, held_out), 2000)} for held_out in (False, True)]
    assert not drawn[0] & drawn[1] and min(map(len, drawn)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_validation_has_each_of_its_sequences_once_and_padding_in_the_end(name):
    source = make(name, held_out=True, batch_size=1000)
    batches = [source.rows(number, range(1000)) for number in range(source.num_batches)]
    there = np.concatenate([(batch["targets"] != 0).any(axis=1) for batch in batches])
    assert len(batches) == 3 and there.tolist() == [True] * 2048 + [False] * 952
    assert all((batch["bytes"] == 0).all() for batch in batches)


def test_a_value_is_stale_when_its_name_has_a_later_one():
    source = make("assignment")
    tokens = tokens_of(source, 100)
    place, stale, alive = source.task.stale(tokens)
    for row, (pieces, answers) in enumerate(sequences(source, 100)):
        told = assignments_of(pieces)
        latest = {name: n for n, (name, _) in enumerate(told)}
        assert place[row] == answers[0] - 1
        assert np.flatnonzero(alive[row]).tolist() == sorted(2 * n + 1 for n in latest.values())
        expected = [2 * n + 1 for n, (name, _) in enumerate(told) if latest[name] != n]
        assert np.flatnonzero(stale[row]).tolist() == expected


def test_in_parity_all_before_the_last_result_is_stale():
    source = make("parity")
    tokens = tokens_of(source, 100)
    place, stale, alive = source.task.stale(tokens)
    for row, (pieces, _) in enumerate(sequences(source, 100)):
        last = len(pieces) - 2  # the bit whose result is asked for
        assert place[row] == last
        assert np.flatnonzero(alive[row]).tolist() == [last - 1]
        assert np.flatnonzero(stale[row]).tolist() == list(range(last - 1))


@pytest.mark.parametrize(
    ("name", "length", "sizes", "message"),
    [
        ("assignment", 15, {}, "context_length 15 is too short .* choose 16 at least"),
        ("parity", 15, {}, "too short for task parity; choose 16 at least"),
        ("assignment", 48, {"values": 1}, "needs a name, two values and a query at least"),
        ("sorting", 48, {}, "'sorting' is not a task; choose one of assignment, parity"),
    ],
)
def test_a_task_that_cannot_be_made_says_why(name, length, sizes, message):
    with pytest.raises(DataError, match=message):
        TaskTrainBatches(find_task(name, **SIZES | sizes), context_length=length, batch_size=2, seed=0)
