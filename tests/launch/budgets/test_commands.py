"""What the commands read, write, and resume from."""

import pytest

from launch.budgets.__main__ import main
from launch.budgets.inputs import located
from launch.budgets.result import Journal
from tests.support.disks import bucket


def test_a_journal_keeps_what_was_measured_but_not_a_torn_last_line(tmp_path):
    path = tmp_path / "journal"
    Journal(path, {"policy": "tova"})[8, 4] = 1.25, 1.5
    with path.open("a") as stream:
        stream.write("[[8, 2], 1.")
    again = Journal(path, {"policy": "tova"})
    assert dict(again) == {(8, 4): (1.25, 1.5)}
    again[2, 2] = 3.0, 3.5
    assert dict(Journal(path, {"policy": "tova"})) == {(8, 4): (1.25, 1.5), (2, 2): (3.0, 3.5)}


def test_a_journal_of_another_search_is_refused(tmp_path):
    Journal(tmp_path / "journal", {"policy": "tova"})[8, 4] = 1.25, 1.5
    with pytest.raises(ValueError, match=r"is of another search, .*; remove it, or give another --output"):
        Journal(tmp_path / "journal", {"policy": "h2o"})


def test_a_workdir_without_a_checkpoint_is_named(capsys, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit_info:
        main(["search", f"--checkpoint={tmp_path}/run", "--data=x", "--target-perplexity=9", f"--output={tmp_path}/x"])
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: {tmp_path}/run: there is no checkpoint in {tmp_path}/run/checkpoints"


def test_a_workdir_in_a_bucket_keeps_its_address(capsys, tmp_path, monkeypatch):
    bucket(monkeypatch).mkdirs("gs://bucket/run/checkpoints")
    with pytest.raises(SystemExit):
        main(["search", "--checkpoint=gs://bucket/run", "--data=x", "--target-perplexity=9", f"--output={tmp_path}/x"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: gs://bucket/run: there is no checkpoint in gs://bucket/run/checkpoints"
    assert located("gs://bucket/run") == "gs://bucket/run"
