"""A mistake in the command is one line that says what to do, before anything is compiled."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT
from tests.support.plans import run_plan

D8 = "--config=configs/c4.py:d8"
MISTAKES = {
    "unknown topology": ([D8, "--topology=v4-33"], "choose one of v4-8, v4-16, v4-32"),
    "batch too small": ([D8, "--topology=v4-32", "--config.batch_size=8"], "--config.batch_size=16"),
    "mesh of other chips": (
        [D8, "--topology=v4-8", "--mesh=data=3,fsdp=2"],
        "so that the product is 4, for example --mesh=data=2",
    ),
    "mesh of a larger slice": ([D8, "--topology=v4-8", "--mesh=data=1,fsdp=8"], "--mesh=fsdp=4"),
    "no such axis": ([D8, "--mesh=rows=2"], "'rows=2' is not AXIS=SIZE"),
    "misspelt group": ([D8, "--config.modl.width=3"], "--config has no key modl; did you mean model?"),
    "stray argument": ([D8, "v4-8"], "unexpected argument 'v4-8'"),
    "a flag of training": ([D8, "--topology=v4-8", "--decode", "--sweep"], "--sweep is for training"),
    "a dtype of decoding": ([D8, "--cache-dtype=int8"], "--cache-dtype is for decoding; give --decode too"),
    "a flag of decoding": ([D8, "--memory-factor=4"], "--memory-factor is for decoding; give --decode too"),
    "no folder": ([D8, "--json=/no/such/folder/x"], "there is no folder /no/such/folder"),
}


@pytest.mark.tpu_compile
@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(flags, message):
    done = run_plan(*flags)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_without_the_compiler_it_says_how_to_install_it():
    program = f"import sys, runpy; sys.modules['libtpu'] = None; sys.argv = ['plan', '{D8}']; "
    program += "runpy.run_module('launch.plan', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the TPU compiler is not installed; run: pip install -e '.[tpu]'"


def compilers(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group) and "launch.plan.compiler" in line]


@pytest.mark.tpu_compile
def test_a_sweep_says_how_long_it_takes_and_can_be_stopped(tmp_path):
    command = [sys.executable, "-m", "launch.plan", D8, "--topology=v4-2048", "--config.batch_size=4096", "--sweep"]
    command.append(f"--json={tmp_path}/sweep.json")
    # A group of its own, as a terminal gives it; a shell's background jobs ignore the signal, and so would it.
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = started.stderr.readline()
    said = re.search(r"^Compiling \d+ meshes, (\d) at once: roughly \d+ minutes; Ctrl-C stops", first)
    assert said, first
    while len(compilers(started.pid)) < int(said[1]):
        assert started.poll() is None
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGINT)
    rest = started.stderr.read()
    assert started.wait() == 130 and rest.splitlines()[-1] == "stopped", rest
    assert not (tmp_path / "sweep.json").exists()
