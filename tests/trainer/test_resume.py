"""Real processes, real signals: an interrupted run ends where an undisturbed one does, bit for bit."""

import signal

import pytest

from trainer.interrupt import EXIT_PREEMPTED


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_ends_bit_identical(
    start_trainer, run_until, finish, assert_same_run, undisturbed, tmp_path, number
):
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

    assert_same_run(tmp_path, undisturbed)


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


def test_finished_run_says_so_and_changes_nothing(start_trainer, finish, tmp_path):
    assert finish(start_trainer(tmp_path, steps=5))[0] == 0
    before = (tmp_path / "result.json").stat().st_mtime_ns
    code, output = finish(start_trainer(tmp_path, steps=5))
    assert code == 0 and "already finished" in output
    assert (tmp_path / "result.json").stat().st_mtime_ns == before
