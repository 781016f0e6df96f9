"""Files that cannot be used, disks that are full, and streams that end: one line, and what to do."""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from inference_budget.interchange import write_budgets_file
from launch.budgets.__main__ import main
from launch.budgets.result import Journal
from tests.support import ROOT
from tests.support.searches import search

TARGET = "--target-perplexity=1e9"


@pytest.fixture
def refused(folder, tmp_path, capfd, monkeypatch):
    """Runs a command in an empty folder; gives the line that it ends with, and holds that it wrote nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_info:
            main([argument.format(folder=folder) for argument in arguments])
        assert exit_info.value.code == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 or lines[0].startswith("usage: ")  # which argparse shows before its line
        assert sorted(tmp_path.rglob("*")) == before
        return lines[-1]

    return run


def test_text_on_standard_input_that_is_not_utf_8(refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert refused("generate", "--budgets={folder}/budgets.json").endswith("convert it, such as with iconv")


def test_steps_out_of_range(refused, tmp_path):
    shown = refused(*search("{folder}"), TARGET, "--first-step=3", f"--output={tmp_path}/x")
    assert shown == "error: steps must be from 1 to 15, the first at least the last; got 3 and 7"


def test_a_target_out_of_reach(refused, tmp_path):
    (tmp_path / "x.journal").touch()
    shown = refused(*search("{folder}"), "--target-perplexity=1.5", f"--output={tmp_path}/x")
    assert shown.startswith("error: the target perplexity of 1.500 is out of reach: the best is ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "inference_budget.Budgets/2"}, "does not say that its format is"),
        ({"budgets": [1, 4]}, "the budget of layer 0 is 1; it must be from 2"),
        ({"budgets": [4, 17]}, "the budget of layer 1 is 17; it must be from 2"),
        ({"budgets": [4, 4, 4]}, "there are 3 budgets, but the model has 2 layers"),
        ({"budgets": [4, "a"]}, "budgets[1] is 'a', not a whole number; make it with `search`"),
        ({"budgets": [4, True]}, "budgets[1] is True, not a whole number; make it with `search`"),
        ({"budgets": None}, "budgets is None, not a list; make it with `search`"),
        ({"context_length": "16"}, "context_length is '16', not a whole number; make it with `search`"),
        ({"policy": "lru"}, "error: there is no policy 'lru'; take selective, h2o, "),
        ({"policy": ["tova"]}, "policy is ['tova'], not text; make it with `search`"),
        ({"checkpoint": "model"}, "checkpoint is 'model', not an object; make it with `search`"),
        ({"checkpoint": {"path": "x"}}, "checkpoint lacks 'fingerprint'; make it with `search`"),
        ({"checkpoint": {"path": None, "fingerprint": ""}}, "checkpoint.path is None, not text; make it with `search`"),
        ({"data": None}, "data is None, not an object; make it with `search`"),
        ({"windows": {"train": None}}, "windows['train'] is None, not a whole number; make it with `search`"),
    ],
)
def test_files_of_budgets(folder, refused, tmp_path, changes, message):
    content = json.loads((folder / "budgets.json").read_text()) | changes
    (tmp_path / "changed.json").write_text(json.dumps(content))
    for command in (["generate", "--prompt=the", "--tokens=2"], ["evaluate"]):
        assert message in refused(*command, "--budgets=changed.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"found": None}, "found is None, not an object; make it with `search`"),
        ({"validation": {"full": {}}}, "validation lacks 'pruned'; make it with `search`"),
        ({"curve": [1]}, "curve[0] is 1, not an object; make it with `search`"),
        ({"baselines": {"uniform": [{}]}}, "baselines['uniform'][0] lacks 'budgets'; make it with `search`"),
    ],
)
def test_files_of_a_report(folder, refused, tmp_path, changes, message):
    content = json.loads((folder / "budgets.json").read_text()) | changes
    (tmp_path / "changed.json").write_text(json.dumps(content))
    assert message in refused("report", "changed.json", "--output=page.html")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_files_that_are_no_json(refused, tmp_path, text):
    (tmp_path / "cut.json").write_bytes(text.encode("latin-1"))
    assert refused("evaluate", "--budgets=cut.json").startswith("error: cut.json ")


def test_a_model_that_was_cut_off(folder, refused, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    assert refused(*search("{folder}"), TARGET, "--checkpoint=cut", "--output=x").endswith("; export the model again")


@contextlib.contextmanager
def full_disk(size):
    """Files of this process grow to so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 60])  # in the middle of its first line, and behind it
def test_a_journal_on_a_full_disk_says_so_and_goes_on_with_what_was_measured(tmp_path, size):
    path, measured = tmp_path / "journal", {(16, n): (n / 7, n / 3) for n in range(2, 9)}
    kept: dict[tuple[int, ...], tuple[float, float]] = {}
    with full_disk(size), pytest.raises(ValueError, match=r"journal: .*, the same command then goes on"):
        journal = Journal(path, {"policy": "tova"})
        for budgets, losses in measured.items():
            journal[budgets] = losses
            kept[budgets] = losses
    journal = Journal(path, {"policy": "tova"})
    assert dict(journal) == kept
    journal.update(measured)
    assert dict(Journal(path, {"policy": "tova"})) == measured


def test_a_journal_without_losses_is_no_other_search_s(tmp_path):
    for policy in ("tova", "h2o"):
        journal = Journal(tmp_path / "journal", {"policy": policy})
    journal[2, 2] = 1.0, 2.0
    with pytest.raises(ValueError, match="is of another search"):
        Journal(tmp_path / "journal", {"policy": "tova"})


def test_a_line_that_is_no_journal_s_stays(tmp_path):
    (tmp_path / "journal").write_text("dear diary")
    with pytest.raises(ValueError, match="is of another search"):
        Journal(tmp_path / "journal", {"policy": "tova"})


def test_budgets_on_a_full_disk_leave_the_file_that_is_there_and_no_other(tmp_path):
    write_budgets_file(tmp_path / "budgets.json", {"budgets": [1]})
    before = (tmp_path / "budgets.json").read_text()
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        write_budgets_file(tmp_path / "budgets.json", {"budgets": [2]})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("budgets.json", before)]


def start(*arguments, **streams):
    command = [sys.executable, "-m", "launch.budgets", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **streams)


def test_output_to_a_full_disk(folder):
    with open("/dev/full", "w") as full:
        process = start("evaluate", f"--budgets={folder}/budgets.json", stdout=full)
        error = process.communicate()[1]
    assert (process.returncode, error) == (2, "error: the output: No space left on device; see to it and try again\n")


def test_nobody_who_reads_on_is_no_mistake_and_no_word(folder):
    process = start("evaluate", f"--budgets={folder}/budgets.json", stdout=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_an_interrupted_search_says_that_the_same_command_goes_on(folder, tmp_path, monkeypatch):
    (tmp_path / "interrupts_itself.py").write_text(
        "import os, signal, time\n"
        "from inference_budget import OldestFirst\n"
        "from launch.budgets.result import Journal\n"
        "note = Journal.__setitem__\n"
        "def note_then_ctrl_c(*arguments):\n"
        "    note(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "Journal.__setitem__ = note_then_ctrl_c\n"
        "class Policy(OldestFirst):\n"
        "    name = 'policy'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(*search(folder, TARGET, "--policy=interrupts_itself:Policy", f"--output={tmp_path}/x.json"))
    error = process.communicate()[1]
    assert error == "interrupted; the same command goes on from the journal beside its output\n"
    assert process.returncode == 130
