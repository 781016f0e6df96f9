"""Real processes, real signals: an interrupted run ends where an undisturbed one does, bit for bit."""

import os
import signal
import time

import pytest

from tests.support.runs import losses
from trainer.hosts.interrupt import EXIT_PREEMPTED
from trainer.loop import train
from trainer.settings import read_settings


@pytest.fixture(scope="module")
def undisturbed(start_trainer, finish, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start_trainer(workdir))
    assert code == 0, output
    return workdir


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_run_ends_bit_identical(
    start_trainer, run_until, finish, assert_same_run, undisturbed, tmp_path, number
):
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

    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_signal_exits_at_once_and_leaves_a_usable_workdir(start_trainer, run_until, finish, tmp_path):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending",
    [
        "killed",
        "second SIGTERM",
        "too late",
    ],
)
def test_a_run_that_ends_between_commit_and_seal_of_a_checkpoint_loses_nothing(
    start_trainer, run_until, finish, assert_same_run, undisturbed, tmp_path, ending
):
    pipe = tmp_path / "checkpoints" / "5.checksums.json.tmp"
    pipe.parent.mkdir()
    os.mkfifo(pipe)  # sealing waits for a reader
    process = start_trainer(tmp_path, faults__exit_seconds=3)
    run_until(process, "step 8 ")  # training does not
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "5").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if ending == "killed":
        process.kill()
    else:
        process.send_signal(signal.SIGTERM)
    if ending == "second SIGTERM":
        run_until(process, "once more exits at once")
        process.send_signal(signal.SIGTERM)
        run_until(process, "SIGTERM again: exiting without saving")
    elif ending == "too late":
        run_until(process, "not saved within 3 s: exiting without saving")
    assert finish(process)[0] == (-signal.SIGKILL if ending == "killed" else EXIT_PREEMPTED)
    pipe.unlink()
    code, output = finish(start_trainer(tmp_path))
    assert code == 0, output
    assert "checkpoint 5 had no checksums" in output and "starting at step 5 " in output
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_sigterm_in_an_evaluation_loses_neither_its_point_nor_the_best_checkpoint(
    start_trainer, start_process, finish, assert_same_run, undisturbed, tmp_path
):
    keep = {"checkpoint__keep_last": 1, "checkpoint__keep_best": 1}
    fault = ["tests.support.faulty_trainer", "sigterm_in_an_evaluation"]
    code, output = finish(start_process(fault, tmp_path, **keep))
    assert code == EXIT_PREEMPTED and "saved at step 20;" in output, output
    code, output = finish(start_trainer(tmp_path, **keep))
    assert code == 0, output
    assert_same_run(tmp_path, undisturbed)
    losses_by_step = dict(losses(undisturbed, "run/validation_loss"))
    assert losses_by_step[20] < losses_by_step[10]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"20", "30"}


def test_finished_run_says_so_and_changes_nothing(start_trainer, finish, undisturbed):
    before = (undisturbed / "result.json").stat().st_mtime_ns
    code, output = finish(start_trainer(undisturbed))
    assert code == 0 and "already finished" in output
    assert (undisturbed / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["", '{"steps": 2, '])
def test_finished_run_whose_result_cannot_be_read_computes_it_again(tiny_config, tmp_path, spoilt):
    tiny_config.steps = 2
    assert train(read_settings(tiny_config), str(tmp_path)) == 0
    result = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").write_text(spoilt)
    assert train(read_settings(tiny_config), str(tmp_path)) == 0
    assert (tmp_path / "result.json").read_text() == result


@pytest.mark.slow
def test_finished_run_whose_last_checkpoint_is_damaged_makes_it_again(start_trainer, finish, assert_same_run, tmp_path):
    for name in ("damaged", "undisturbed"):
        assert finish(start_trainer(tmp_path / name, steps=10))[0] == 0
    last = tmp_path / "damaged" / "checkpoints" / "10"
    data = max(last.glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    code, output = finish(start_trainer(tmp_path / "damaged", steps=10))
    assert code == 0 and "10 is damaged" in output and "starting at step 5 " in output, output
    assert_same_run(tmp_path / "damaged", tmp_path / "undisturbed")
