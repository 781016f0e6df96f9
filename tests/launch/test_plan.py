"""Plans of the trainer's own step, by the real TPU compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.plan", "--config=configs/c4.py:d8", *flags]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=900)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v4-33"], "v4-32"),
        (["--topology=v4-32", "--mesh=rows=2"], "'rows=2' is not AXIS=SIZE"),
        (["--topology=v4-32", "--config.batch_size=8"], "--config.batch_size=16"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(flags, message):
    done = run_plan(*flags)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.tpu_compile
def test_a_plan_adds_up_and_shards_the_state(tmp_path):
    done = run_plan("--topology=v4-8", "--mesh=data=1,fsdp=4", f"--json={tmp_path}/plan.json", f"--hlo={tmp_path}/hlo")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and "estimated" in done.stdout
    assert plan["step_ms"] == pytest.approx(sum(plan["step_ms_by_part"].values()))
    assert plan["hbm_total_bytes"] == sum(plan["hbm_bytes"].values())
    assert plan["hbm_bytes"]["parameters"] == pytest.approx(
        plan["state_bytes"] / 3 / 4, rel=0.02
    )  # Adam keeps two more
    assert 0.05 < plan["mfu"] < 1
    assert (tmp_path / "hlo").read_text().startswith("HloModule")
