"""The exit policy stands once, in trainer/errors.py: what else tells it says the same."""

import re
import subprocess
import sys

import pytest

from launch import emulate
from tests.support import ROOT
from trainer.errors import ExitCode


def test_the_worker_of_a_pod_names_every_code_as_the_policy_does():
    text = (ROOT / "launch/worker.sh").read_text()
    cases = re.findall(r"^ +([\d |]+)\) state=(\w+) ;;$", text, re.MULTILINE)
    states = {int(code): state for codes, state in cases for code in codes.split("|")}
    # What ends by SIGABRT or SIGTERM did so because of another host, and FAILED is told from running out of memory.
    assert states == {code: code.state for code in ExitCode if code != ExitCode.FAILED} | {134: "lost", 143: "lost"}
    assert f"else state={ExitCode.FAILED.state}; fi" in text


def test_the_worker_of_a_pod_starts_again_what_the_policy_retries():
    text = (ROOT / "launch/worker.sh").read_text()
    (for_good,) = re.findall(r"^ +([a-z_ |]+)\) ;;$", text, re.MULTILINE)
    assert set(for_good.split(" | ")) == {code.state for code in ExitCode if not code.retried}


def test_the_table_of_exit_codes_is_the_policy():
    head = "| exit code | meaning |"
    pages = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
    (page,) = (page for page in pages if head in page)
    table = page.partition(head)[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+|other) \| .* \| (.*) \|$", table, re.MULTILINE)
    told = {int(code): again.startswith("yes") for code, again in rows if code != "other"}
    assert told == {code: code.retried for code in ExitCode if code != ExitCode.FAILED}


def test_a_launcher_can_ask_without_loading_jax():
    program = "import sys, trainer.errors; print(sorted({'jax', 'numpy', 'absl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_emulated_pod_does_not_start_again_with_a_host_that_computes_wrongly(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__main__.py").write_text(f"raise SystemExit({int(ExitCode.CORRUPT)})")  # what a host ends with
    flags = ["--hosts=2", "--devices-per-host=1", "--restart", "--", "--config=any"]
    program = (
        f"import os; from launch import emulate; os.chdir({str(tmp_path)!r}); raise SystemExit(emulate.main({flags}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == ExitCode.CORRUPT and done.stdout.count("started host 0") == 1, done.stdout + done.stderr
    assert "replace the host" in done.stdout


def test_an_emulated_pod_explains_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        emulate.main(["--help"])
    assert ended.value.code == 0 and "--devices-per-host" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        emulate.main(["--hosts", "2", "--devices-per-host", "4"])
    assert ended.value.code == 2 and "give the trainer's flags after --" in capsys.readouterr().err
