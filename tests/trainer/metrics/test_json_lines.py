"""`metrics.jsonl`: every point once, whatever becomes of the processes that wrote it."""

import json
import math

import pytest

from tests.support.disks import bucket
from trainer.metrics import json_lines
from trainer.metrics.json_lines import METRICS_FILE, JsonLinesWriter, Series, read_metrics


def write(workdir, first_step, steps, offset=0.0):
    writer = JsonLinesWriter(workdir / METRICS_FILE, first_step)
    for step in steps:
        writer.write(step, {"run/loss": offset + step})
    writer.close()


def losses(workdir):
    series = read_metrics(workdir).scalars["run/loss"]
    return list(zip(series.steps, series.values, strict=True))


def test_a_run_that_has_written_nothing_has_nothing(tmp_path):
    assert read_metrics(tmp_path).scalars == {}


def test_a_restart_withdraws_what_is_computed_again(tmp_path):
    write(tmp_path, 1, range(1, 8))
    write(tmp_path, 5, range(5, 10), offset=100)
    assert losses(tmp_path) == [(s, s) for s in range(1, 5)] + [(s, 100 + s) for s in range(5, 10)]
    assert [(begin.first_step, begin.is_rollback) for begin in read_metrics(tmp_path).begins] == [
        (1, False),
        (5, False),
    ]


def test_a_rollback_withdraws_too_and_is_told_from_a_restart(tmp_path):
    writer = JsonLinesWriter(tmp_path / METRICS_FILE, 1)
    writer.write(1, {"run/loss": 1.0})
    writer.write(2, {"run/loss": math.nan})
    writer.withdraw(2)
    writer.write(2, {"run/loss": 2.0})
    writer.close()
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert [begin.is_rollback for begin in read_metrics(tmp_path).begins] == [False, True]


def test_half_a_line_of_a_killed_process_spoils_nothing_else(tmp_path):
    write(tmp_path, 1, range(1, 4))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert losses(tmp_path) == [(1, 1), (2, 2)]
    write(tmp_path, 3, range(3, 6))
    assert losses(tmp_path) == [(s, s) for s in range(1, 6)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e-30, 0.1 + 0.2, 3.4028234663852886e38])
def test_a_number_comes_back_as_the_float32_that_it_was_and_each_line_is_strict_json(tmp_path, value):
    writer = JsonLinesWriter(tmp_path / METRICS_FILE, 1)
    writer.write(1, {"x": value})
    writer.close()
    for line in (tmp_path / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    (found,) = read_metrics(tmp_path).scalars["x"].values
    assert found == pytest.approx(value, rel=2**-25, nan_ok=True)


def test_texts_and_hparams_are_those_of_the_last_start(tmp_path):
    for first_step, seed in ((1, 0), (5, 1)):
        writer = JsonLinesWriter(tmp_path / METRICS_FILE, first_step)
        writer.text(first_step, "command", f"start {first_step}")
        writer.hparams(first_step, {"seed": seed})
        writer.close()
    metrics = read_metrics(tmp_path)
    assert metrics.texts == {"command": "start 5"} and metrics.hparams == {"seed": 1}


def test_lines_that_a_full_disk_refuses_are_written_once_there_is_space(small_disk, caplog):
    writer = JsonLinesWriter(small_disk / METRICS_FILE, 1)
    writer.write(1, {"run/loss": 1.0})
    writer.flush()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space"):
        while stream.write(bytes(1 << 12)):
            pass
    for step in range(2, 400):
        writer.write(step, {"run/loss": float(step)})
    writer.flush()
    assert "cannot be written for now" in caplog.text
    filler.unlink()
    writer.close()
    assert losses(small_disk) == [(step, step) for step in range(1, 400)]


def test_points_after_a_withdrawal_that_was_lost_replace_the_older_ones(tmp_path):
    write(tmp_path, 1, range(1, 6))
    write(tmp_path, 3, range(3, 5), offset=10)
    path = tmp_path / METRICS_FILE
    path.write_text("".join(x for x in path.read_text().splitlines(True) if '"start": 3' not in x))
    assert read_metrics(tmp_path).scalars["run/loss"].values == [1, 2, 13, 14]


def test_withdrawing_keeps_what_is_before():
    series = Series([1, 5, 9], [1.0, 5.0, 9.0], [0.0, 0.0, 0.0])
    series.withdraw(5)
    assert (series.steps, series.values, series.times) == ([1], [1.0], [0.0])


def test_in_a_bucket_the_file_is_the_same_over_restarts(monkeypatch, tmp_path):
    storage = bucket(monkeypatch)
    for workdir in (tmp_path, "gs://bucket/run"):
        for first_step, offset in ((1, 0.0), (4, 10.0)):
            writer = JsonLinesWriter(f"{workdir}/{METRICS_FILE}", first_step)
            for step in range(first_step, 7):
                writer.write(step, {"run/loss": offset + step})
                writer.flush()
            writer.close()
    there, here = (read_metrics(workdir) for workdir in ("gs://bucket/run", tmp_path))
    assert there.scalars["run/loss"].values == here.scalars["run/loss"].values == [1, 2, 3, 14, 15, 16]
    assert len(storage.cat_file("gs://bucket/run/metrics.jsonl").splitlines()) == 2 + 6 + 3


def test_the_slower_the_storage_the_rarer_it_is_written(monkeypatch, tmp_path):
    now, written = [0.0], []

    def append(path, content):
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(json_lines.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(json_lines, "_append", append)
    writer = JsonLinesWriter(tmp_path / METRICS_FILE, 1)
    for step in range(1, 1001):
        now[0] += 1.0
        writer.write(step, {"run/loss": 1.0})
    assert len(written) == 5 and sum(2.0 for _ in written) <= 0.011 * now[0]


def test_why_a_process_ended_is_known_until_the_next_begins(tmp_path):
    writer = JsonLinesWriter(tmp_path / METRICS_FILE, 1)
    writer.text(3, "failure", "DivergedError: too bad")
    writer.close()
    assert read_metrics(tmp_path).texts["failure"] == "DivergedError: too bad"
    write(tmp_path, 3, [3])
    assert "failure" not in read_metrics(tmp_path).texts


def test_the_rows_of_a_table_are_read_back(tmp_path):
    writer = JsonLinesWriter(tmp_path / METRICS_FILE, 1)
    writer.text(1, "environment", "| | |\n|---|---|\n| devices | 8 x cpu, 1 hosts |\n| parameters, total | 61,760 |")
    writer.close()
    assert read_metrics(tmp_path).table("environment") == {"devices": "8 x cpu, 1 hosts", "parameters, total": "61,760"}
