"""What the commands write, resume from and refuse."""

import pytest

from launch.budgets.__main__ import main
from launch.budgets.result import Journal


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
    with pytest.raises(ValueError, match="is of another search; remove it, or give another --output"):
        Journal(tmp_path / "journal", {"policy": "h2o"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--budgets", "nowhere.json"], "error: nowhere.json cannot be read"),
        (
            ["search", "--checkpoint=nowhere", "--data=nowhere", "--target-perplexity=9", "--output=x.json"],
            "error: nowhere holds no model: neither config.json nor a training run's checkpoints",
        ),
        (["search", "--checkpoint=a", "--data=b", "--target-perplexity=1", "--output=x"], "above 1, not 1"),
        (["search", "--checkpoint=a", "--data=b", "--output=x"], "--target-checkpoint --target-perplexity"),
        (["search", "--policy=lru"], "invalid choice: 'lru'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_workdir_without_a_checkpoint_is_named(capsys, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit_info:
        main(["search", f"--checkpoint={tmp_path}/run", "--data=x", "--target-perplexity=9", f"--output={tmp_path}/x"])
    assert exit_info.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: {tmp_path}/run: there is no checkpoint in {tmp_path}/run/checkpoints"
