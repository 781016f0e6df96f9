"""Batches: a pure function of the dataset, the seed, the batch size and the step."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data import DataError, Dataset, EvalBatches, TrainBatches


def split_tokens(dataset: Dataset, split: str) -> np.ndarray:
    info = dataset.manifest.splits[split]
    return dataset.read_records(split, range(info.records)).reshape(-1)[: info.tokens]


def epoch_rows(batches: TrainBatches, epoch: int) -> list[tuple[int, ...]]:
    """The targets of every row of an epoch that has any, sorted."""
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    rows = (row for step in steps for row in batches.rows(step, range(batches.batch_size))["targets"])
    return sorted(tuple(row.tolist()) for row in rows if row.any())


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_rows_do_not_depend_on_the_number_of_hosts(dataset: Dataset, hosts: int) -> None:
    whole = TrainBatches(dataset, context_length=32, batch_size=8, seed=3)
    each = [TrainBatches(dataset, context_length=32, batch_size=8, seed=3) for _ in range(hosts)]
    per_host = 8 // hosts
    for step in (0, 5, whole.steps_per_epoch - 1, whole.steps_per_epoch + 2):
        parts = [each[h].rows(step, range(h * per_host, (h + 1) * per_host)) for h in range(hosts)]
        for key, expected in whole.rows(step, range(8)).items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), expected)


def test_a_fresh_loader_gives_the_batches_of_one_that_ran_across_the_end_of_an_epoch(dataset: Dataset) -> None:
    running = TrainBatches(dataset, context_length=64, batch_size=8, seed=1)
    steps = [*range(running.steps_per_epoch + 5)]
    all_targets = [running.rows(step, range(8))["targets"] for step in steps]
    for resumed_at in (7, running.steps_per_epoch - 1, running.steps_per_epoch, running.steps_per_epoch + 4):
        fresh = TrainBatches(dataset, context_length=64, batch_size=8, seed=1)
        np.testing.assert_array_equal(fresh.rows(resumed_at, range(8))["targets"], all_targets[resumed_at])


@pytest.mark.parametrize("context_length", [8, 32, 64])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_token_is_a_target_exactly_once_per_epoch(dataset: Dataset, context_length: int, epoch: int) -> None:
    batches = TrainBatches(dataset, context_length=context_length, batch_size=7, seed=0)
    tokens = split_tokens(dataset, "train")
    padded = np.pad(tokens, (0, -len(tokens) % context_length)).reshape(-1, context_length)
    assert epoch_rows(batches, epoch) == sorted(tuple(row.tolist()) for row in padded)


def test_epochs_and_seeds_have_orders_of_their_own(dataset: Dataset) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = TrainBatches(dataset, context_length=64, batch_size=8, seed=seed)
        first = epoch * batches.steps_per_epoch
        return np.concatenate([batches.indices(first + step) for step in range(batches.steps_per_epoch)]).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all(sorted(a) == sorted(orders[0]) for a in orders)
    assert orders[0] != sorted(orders[0])


def test_inputs_are_bos_and_the_targets_before(dataset: Dataset) -> None:
    rows = TrainBatches(dataset, context_length=32, batch_size=8, seed=0).rows(2, range(8))
    assert rows["inputs"].dtype == rows["targets"].dtype == np.int32
    assert (rows["inputs"][:, 0] == dataset.manifest.tokenizer.bos_id).all()
    np.testing.assert_array_equal(rows["inputs"][:, 1:], rows["targets"][:, :-1])


def test_the_last_batch_of_an_epoch_is_filled_with_padding(dataset: Dataset) -> None:
    batches = TrainBatches(dataset, context_length=64, batch_size=7, seed=0)
    assert batches.num_windows % 7, "the case needs a remainder"
    last = batches.rows(batches.steps_per_epoch - 1, range(7))["targets"]
    assert [row.any() for row in last] == [row < batches.num_windows % 7 for row in range(7)]


def test_evaluation_reads_the_split_in_order_and_fills_up_with_padding(dataset: Dataset) -> None:
    batches = EvalBatches(dataset, context_length=16, batch_size=5)
    targets = np.concatenate([batches.rows(i, range(5))["targets"] for i in range(batches.num_batches)]).reshape(-1)
    tokens = split_tokens(dataset, "validation")
    np.testing.assert_array_equal(targets[: len(tokens)], tokens)
    assert len(targets) % (16 * 5) == 0
    assert not targets[len(tokens) :].any()


def test_rows_may_be_read_by_threads(dataset: Dataset) -> None:
    batches = TrainBatches(dataset, context_length=32, batch_size=8, seed=0)
    expected = [batches.rows(step, range(8))["targets"] for step in range(40)]
    fresh = TrainBatches(dataset, context_length=32, batch_size=8, seed=0)
    with ThreadPoolExecutor(8) as pool:
        for targets, result in zip(expected, pool.map(lambda step: fresh.rows(step, range(8)), range(40)), strict=True):
            np.testing.assert_array_equal(result["targets"], targets)


def test_a_context_that_does_not_divide_the_record_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="context_length 48 does not divide the dataset's record length 64"):
        TrainBatches(dataset, context_length=48, batch_size=2, seed=0)


def test_a_split_smaller_than_a_batch_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="fewer than one batch of 100000"):
        TrainBatches(dataset, context_length=64, batch_size=100_000, seed=0)


def test_an_unknown_split_is_an_error_that_names_the_others(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        EvalBatches(dataset, context_length=64, batch_size=2, split="test")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_bytes_of_all_rows_are_those_of_the_text(dataset: Dataset, split: str) -> None:
    batches = EvalBatches(dataset, context_length=32, batch_size=8, split=split)
    counted = sum(int(batches.rows(i, range(8))["bytes"].sum()) for i in range(batches.num_batches))
    assert counted == dataset.manifest.splits[split].text_bytes
