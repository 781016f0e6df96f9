"""Span corruption: nothing is lost, sizes are T5's, and the blanks depend on nothing but stream, step and row."""

import itertools

import numpy as np
import pytest

from data import DataError, SpanBatches, SpanCorruption
from data.spans import fillings

PAD, BOS, EOS, SENTINEL = 0, 1, 2, 100


class Windows:
    """Random windows of 64 tokens with ends of documents, some short, one empty."""

    context_length, batch_size, num_batches = 64, 500, 2

    def rows(self, step, rows):
        rng = np.random.default_rng(step)
        tokens = rng.integers(3, SENTINEL, (500, 64), dtype=np.int32)
        tokens[rng.random(tokens.shape) < 0.03] = EOS
        lengths = np.where(np.arange(500) % 5, 64, rng.integers(0, 65, 500))
        lengths[:3] = 0, 1, 2
        return {"targets": np.where(np.arange(64) < lengths[:, None], tokens, PAD)[list(rows)]}


def spans(stream="training, seed 0", **corruption):
    ids = {"first_sentinel": SENTINEL, "bos_id": BOS, "pad_id": PAD}
    return SpanBatches(Windows(), SpanCorruption(**corruption), stream, **ids)


def rejoined(inputs: list[int], targets: list[int]) -> list[int]:
    """The window again: each sentinel of the inputs gives place to what stands behind it in the targets."""
    window = []
    for token in inputs:
        if token < SENTINEL:
            window.append(token)
            continue
        at = targets.index(token) + 1
        while targets[at] < SENTINEL:
            window.append(targets[at])
            at += 1
    return window


@pytest.mark.parametrize("corruption", [{}, {"rate": 0.5, "mean_span": 1.0}, {"rate": 0.9, "mean_span": 8.0}])
def test_inputs_and_targets_give_the_window_back(corruption):
    for step in range(2):
        batch, windows = spans(**corruption).rows(step, range(500)), Windows().rows(step, range(500))["targets"]
        assert not batch["bytes"].any()
        for window, *row in zip(windows, *(batch[n] for n in ("encoder_inputs", "inputs", "targets")), strict=True):
            inputs, outputs, targets = (x.tolist() for x in row)
            assert outputs == [BOS, *targets[:-1]]
            inputs, targets = ([t for t in x if t != PAD] for x in (inputs, targets))
            window = window[window != PAD].tolist()
            assert rejoined(inputs, targets) == window
            used = [t for t in targets if t >= SENTINEL]
            assert used == [*range(SENTINEL, SENTINEL + len(used))] and used[:-1] == [
                t for t in inputs if t >= SENTINEL
            ]
            if window:
                missing, blanks = SpanCorruption(**corruption).counts(len(window))
                assert (len(targets) - len(used), len(used) - 1) == (missing, blanks) and targets[-1] == used[-1]
            assert all(a < SENTINEL or b < SENTINEL for a, b in itertools.pairwise(targets))  # none empty


def test_sizes_are_t5s_rounded_up_to_whole_registers():
    # T5's windows of 568 tokens: 512 inputs of which one is EOS, 114 targets.
    missing, blanks = SpanCorruption().counts(568)
    assert (568 - missing + blanks + 1, missing + blanks + 1) == (512, 114)
    assert SpanCorruption().sizes(512) == (464, 104, 27)  # 461 and 104 are used


def test_every_place_of_the_window_is_as_likely_to_be_a_blank_s():
    texts = np.arange(3, 67, dtype=np.int32)

    class Same(Windows):
        def rows(self, step, rows):
            return {"targets": np.tile(texts, (len(list(rows)), 1))}

    source = SpanBatches(Same(), SpanCorruption(), "x", first_sentinel=SENTINEL, bos_id=BOS, pad_id=PAD)
    targets = np.concatenate([source.rows(step, range(500))["targets"] for step in range(8)])
    share = np.array([np.mean(np.any(targets == token, axis=1)) for token in texts])
    assert share[0] == 0 and share[-1] == 1  # as in T5's code
    assert share.mean() == pytest.approx(10 / 64) and np.ptp(share[12:52]) < 0.05


def test_blanks_depend_on_stream_step_and_row_alone():
    whole = spans().rows(1, range(500))
    for name, rows in spans().rows(1, range(100, 200)).items():
        np.testing.assert_array_equal(rows, whole[name][100:200])
    for other in (spans("training, seed 1").rows(1, range(500)), spans().rows(0, range(500))):
        differ = np.any(other["targets"] != whole["targets"], axis=1)
        assert differ[np.arange(500) % 5 > 0][2:].all()  # the full ones; short ones have few ways


def test_no_rows_have_their_lengths():
    assert {n: x.shape for n, x in spans().rows(0, range(0)).items()} == {
        "encoder_inputs": (0, 64),
        "inputs": (0, 16),
        "targets": (0, 16),
        "bytes": (0,),
    }


def test_fillings_end_where_a_sentinel_is_missing():
    read = [SENTINEL, 5, 6, SENTINEL + 1, 7, SENTINEL + 3, 8]
    assert fillings(np.array(read), SENTINEL) == [[5, 6], [7]]
    assert fillings(np.array([5, SENTINEL]), SENTINEL) == []


@pytest.mark.parametrize("corruption", [{"rate": 0.0}, {"rate": 1.0}, {"mean_span": 0.5}])
def test_a_value_that_makes_no_blanks_is_refused(corruption):
    with pytest.raises(DataError, match=f"{next(iter(corruption))} must be"):
        SpanCorruption(**corruption)
