"""Real processes, real signals: an interrupted run ends where an undisturbed one does, bit for bit."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.interrupt import EXIT_PREEMPTED


def run_until(process, text: str) -> str:
    """Output up to the line that holds `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    pytest.fail(f"{text!r} never came:\n{''.join(seen)}")


def finish(process) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    with ocp.training.Checkpointer(workdir / "checkpoints") as checkpointer:
        state = checkpointer.load(step)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def losses(workdir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_ends_bit_identical(start_trainer, undisturbed, tmp_path, number):
    if not (undisturbed / "result.json").exists():
        code, output = finish(start_trainer(undisturbed))
        assert code == 0, output
    process = start_trainer(tmp_path)
    run_until(process, "step 17 ")
    process.send_signal(number)
    code, output = finish(process)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_PREEMPTED), output

    code, output = finish(start_trainer(tmp_path))
    assert code == 0, output
    start = int(output.split("starting at step ")[1].split()[0])
    if number == signal.SIGTERM:
        assert start >= 17, "SIGTERM saves the step that was reached"
    else:
        assert start in (10, 15), "a checkpoint that was being written when the process was killed may be lost"

    expected, state = saved_state(undisturbed, 30), saved_state(tmp_path, 30)
    assert expected.keys() == state.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert losses(tmp_path) == losses(undisturbed)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 31))  # none missing, none doubled
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads((undisturbed / "result.json").read_text())


def test_a_second_signal_exits_at_once_and_leaves_a_usable_workdir(start_trainer, tmp_path):
    process = start_trainer(tmp_path, steps=100_000)
    run_until(process, "step 6 ")
    process.send_signal(signal.SIGTERM)
    run_until(process, "once more exits at once")
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process)
    assert code == EXIT_PREEMPTED
    process = start_trainer(tmp_path, steps=100_000)
    run_until(process, "step 8 ")
    process.kill()
    process.communicate()


def test_finished_run_says_so_and_changes_nothing(start_trainer, tmp_path):
    assert finish(start_trainer(tmp_path, steps=5))[0] == 0
    before = (tmp_path / "result.json").stat().st_mtime_ns
    code, output = finish(start_trainer(tmp_path, steps=5))
    assert code == 0 and "already finished" in output
    assert (tmp_path / "result.json").stat().st_mtime_ns == before
