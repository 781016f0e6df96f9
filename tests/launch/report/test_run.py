"""What is read of a workdir, what `launch.status` says of it, and of folders where something is missing or broken."""

import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from launch import status
from launch.report import __main__ as report
from launch.report.alarms import alarms
from launch.report.run import ReportError, Run, parse_runs, read_run
from tests.support.disks import bucket
from tests.support.runs import points
from trainer.hosts.lease import LEASE_SECONDS, Holder
from trainer.metrics.json_lines import RunMetrics, Series

GOOD = "run|state|step|training|validation|speed|goodput|restarts|checkpoint|alarms"


def said(capsys, *workdirs: object) -> dict[str, str]:
    """The lines of one run, by their first words."""
    assert status.main([str(workdir) for workdir in workdirs]) == 0
    return dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE))


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    """The killed run's workdir, to be spoilt."""
    return shutil.copytree(killed, tmp_path / "copied")


def test_names_are_folders_or_given_and_as_long_as_needed():
    given = ["a/run", "b/run/", "other", "mine=gs://bucket/x=1", "gs://bucket/y=2"]
    names = {"a/run": "a/run", "b/run": "b/run", "other": "other", "mine": "gs://bucket/x=1"}
    assert parse_runs(given) == names | {"y=2": "gs://bucket/y=2"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "./a"], "a is given twice"),
        (["x=a", "x=b"], "two runs have the name 'x'"),
        (["=a"], "'=a' must be WORKDIR, or NAME=WORKDIR"),
    ],
)
def test_runs_that_cannot_be_told_apart_are_refused(given, message):
    with pytest.raises(ReportError, match=message):
        parse_runs(given)


def test_status_says_of_a_killed_run_what_its_files_say(killed, capsys):
    lines = said(capsys, killed)
    losses, validations = points(killed, "run/loss"), points(killed, "run/validation_loss")
    assert list(lines) == GOOD.split("|")
    assert lines["run"] == f"killed, in {killed}"
    assert lines["state"].startswith("crashed: ended without a word after step 4")
    assert lines["step"] == "4 of 6 (66.7%), 4,096 tokens"
    assert lines["training"].startswith(f"loss {losses[4]:.4f}, {points(killed, 'run/bits_per_byte')[4]:.4f} bits")
    assert lines["validation"].startswith(f"loss {validations[3]:.4f}, perplexity ")
    assert lines["validation"].endswith("at step 3")
    newest = max(int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdecimal())
    assert re.fullmatch(rf"step {newest}, \d+ (s|min) old", lines["checkpoint"])
    goodput = json.loads((killed / "goodput.json").read_text())["seconds"]
    assert lines["goodput"].startswith(f"{goodput['steps'] / sum(goodput.values()):.0%} of ")
    assert (lines["restarts"], lines["alarms"]) == ("none", "none")


def test_status_says_where_a_run_was_started_again_and_what_went_wrong(resumed, diverged, capsys):
    assert said(capsys, resumed)["restarts"].startswith("1, the last at step 3, ")
    lines = said(capsys, diverged)
    assert lines["state"].startswith("crashed: DivergedError: loss or gradient was bad in steps 2 to 3")
    assert lines["alarms"].startswith("steps 2 to 3: 2 updates skipped")
    assert lines["speed"].endswith("s") and ", MFU n/a, a step " in lines["speed"]


def test_several_runs_have_a_block_each_and_a_wrong_folder_an_error(killed, stopped, tmp_path, capsys):
    assert status.main([str(killed), str(tmp_path), str(stopped)]) == 2
    out, errors = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines() if line.startswith("run ")] == ["killed,", "stopped,"]
    assert errors == (
        f"error: run {tmp_path.name!r}: {tmp_path} is no workdir of `python -m trainer`: it holds none of "
        "metrics.jsonl, goodput.json, result.json, lease, checkpoints; correct the path\n"
    )


def test_status_explains_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        status.main(["--help"])
    assert ended.value.code == 0 and "gs://BUCKET/FOLDER" in capsys.readouterr().out


def test_a_run_that_another_machine_gives_signs_of_life_of_goes_on(copied, capsys):
    held = max(copied.glob("lease/*"), key=lambda path: int(path.name))
    holder = Holder("far", 7, 4, time.time(), machine="another", started="1")
    held.write_text(json.dumps(dataclasses.asdict(holder)))
    lines = said(capsys, copied)
    assert re.match(
        r"running: process 7 on far and 3 more of its pod since .*, last sign of life \d s ago", lines["state"]
    )
    old = time.time() - 2 * LEASE_SECONDS
    os.utime(held, (old, old))
    assert said(capsys, copied)["state"].startswith("crashed: ended without a word after step 4")


def test_a_run_in_a_bucket_is_read_as_one_in_a_folder(killed, monkeypatch, capsys, tmp_path):
    storage = bucket(monkeypatch)
    for path in killed.rglob("*"):
        if path.is_file() and path.parent.name != "compilation_cache":
            storage.pipe_file(f"gs://bucket/runs/killed/{path.relative_to(killed)}", path.read_bytes())
    here, there = said(capsys, killed), said(capsys, "gs://bucket/runs/killed")
    assert there["run"] == "killed, in gs://bucket/runs/killed"
    for name in ("state", "step", "validation", "speed", "goodput", "restarts", "alarms"):
        assert there[name] == here[name]
    assert there["checkpoint"].split()[:2] == here["checkpoint"].split()[:2]
    assert report.main(["gs://bucket/runs/killed", "-o", str(tmp_path)]) == 0
    assert "gs://bucket/runs/none is no workdir" in _error(capsys, "gs://bucket/runs/none")


def _error(capsys, workdir: str) -> str:
    assert status.main([workdir]) == 2
    return capsys.readouterr().err


def test_broken_lines_are_passed_over(copied, killed):
    path = copied / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b'\xff\xfe\n[1]\nnull\n{"step": 3}\n'
        + b"".join(lines[:3])
        + b'{"step": 2, "run/lo\n'
        + b"".join(lines[3:])[:-9]
    )
    broken, whole = read_run("broken", str(copied)), read_run("whole", str(killed))
    expected = whole.series("run/loss")
    expected.withdraw(4)  # its line has lost its end
    assert broken.series("run/loss") == expected
    assert broken.state == "crashed"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("result.json", "{", r"result\.json cannot be read \(JSONDecodeError.*the trainer computes it again"),
        ("result.json", '{"loss": 1}', r"result\.json cannot be read \(KeyError"),
        ("goodput.json", '{"seconds": []}', r"goodput\.json cannot be read \(.*where its time went is not known"),
        ("metrics.jsonl", "", r"there is no metrics\.jsonl, or nothing in it yet: curves and config are not known"),
    ],
)
def test_files_that_are_broken_are_named_and_the_rest_is_shown(copied, tmp_path, capsys, file, content, words):
    (copied / file).write_text(content)
    assert report.main([str(copied), "-o", str(tmp_path / "page")]) == 0
    assert re.search(words, capsys.readouterr().out)
    assert re.search(words, (tmp_path / "page/index.html").read_text())
    assert re.search(words, said(capsys, copied)["trouble"])


@pytest.mark.parametrize("perplexity", ["null", "Infinity"])
def test_a_perplexity_beyond_all_numbers_is_read(copied, perplexity):
    content = f'{{"steps": 6, "loss": 800.0, "perplexity": {perplexity}, "bits_per_byte": 1.0, "tokens": 9}}'
    (copied / "result.json").write_text(content)
    assert read_run("mine", str(copied)).validation.perplexity == float("inf")


def test_runs_of_another_vocabulary_or_dataset_are_not_subtracted(killed, copied, tmp_path, capsys):
    path, other = copied / "metrics.jsonl", tmp_path / "other"
    shutil.copytree(copied, other)
    path.write_text(path.read_text().replace('"model.vocab_size": 320', '"model.vocab_size": 640'))
    (other / "metrics.jsonl").write_text(re.sub(r"fingerprint \w+", "fingerprint abcdef012345", path.read_text()))
    text = (other / "metrics.jsonl").read_text().replace('"model.vocab_size": 640', '"model.vocab_size": 320')
    (other / "metrics.jsonl").write_text(text)
    assert report.main([str(killed), str(copied), str(other), "-o", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page/index.html").read_text()
    assert "copied has another vocabulary, of 640 token ids instead of 320: nats per token do not compare" in page
    assert "other was trained on another dataset: nats per token do not compare" in page
    assert "Difference of the losses against" not in page


def test_points_of_an_alarm_are_joined_to_episodes():
    run = Run("mine", "mine", RunMetrics({}, {}, {}, []), "stopped", "", None, None, [])
    run.metrics.scalars["warning/data_bound"] = Series(
        [100, 200, 900, 1000, 9000, 9400], [0.2, 0.4, 0.1, 0.3, 0.5, 0.6], [0.0] * 6
    )
    run.metrics.scalars["warning/skipped_updates"] = Series([7, 8], [1.0, 2.0], [0.0] * 2)
    assert [(alarm.steps, alarm.says) for alarm in alarms(run)] == [
        ("steps 7 to 8", "2 updates skipped: loss or gradient was bad"),
        ("steps 100 to 200", "waited for data, up to 40% of a step"),
        ("steps 900 to 1,000", "waited for data, up to 30% of a step"),
        ("steps 9,000 to 9,400", "waited for data, up to 60% of a step"),
    ]
