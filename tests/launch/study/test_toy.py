"""The study from its dataset to its page, with the real commands, at a size of seconds a command."""

import json
import os
import shutil

import pytest

from launch.study import __main__ as study
from launch.study.cells import PRESETS, Cell, Preset
from launch.study.record import collect


@pytest.mark.exhaustive
def test_two_runs_of_each_cell_are_trained_measured_searched_and_on_the_page(
    dataset_path, tmp_path, monkeypatch, capfd
):
    cells = (
        Cell("standard", "configs/study.py:toy,standard", (1, 2), policies=("oldest",), target="standard"),
        Cell("selective", "configs/study.py:toy", (1, 2), policies=("selective",), target="standard"),
    )
    search = ("--windows=2", "--validation-windows=2", "--step=32")
    monkeypatch.setitem(PRESETS, "toy", Preset(300, 64, cells, search, 0, 2))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    shutil.copytree(dataset_path, tmp_path / "runs/data")
    arguments = ["--preset=toy", f"--workdir={tmp_path / 'runs'}", f"--report={tmp_path}"]
    for _ in range(2):  # the second time there is nothing to do
        with pytest.raises(SystemExit) as ended:
            study.main(arguments)
        assert ended.value.code == 0, capfd.readouterr().err
    jobs = [json.loads(line)["job"] for line in (tmp_path / "runs/times.jsonl").read_text().splitlines()]
    assert len(jobs) == len(set(jobs)) == 4 + 4 + 4 + 2  # trainings, measurements, searches, others' budgets
    record = collect([str(tmp_path / "runs")], [], "", [])
    assert [run["name"] for run in record["runs"]] == ["selective-1", "selective-2", "standard-1", "standard-2"]
    page = (tmp_path / "study.html").read_text()
    for seed in (1, 2):
        ours, theirs = (
            json.loads((tmp_path / f"runs/{name}-{seed}/result.json").read_text())["loss"]
            for name in ("selective", "standard")
        )
        assert f"{ours - theirs:+.4f}" in page
    assert (tmp_path / "budgets.html").exists()
