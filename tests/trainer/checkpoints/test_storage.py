"""Storage that fills up or is forbidden while a real run goes on."""

import shutil
import subprocess
from pathlib import Path

import pytest
from etils import epath

from data import files
from trainer.checkpoints.disk import check_workdir, write_file
from trainer.errors import EXIT_FAILED, EXIT_MISTAKE, ExitCode, StorageError
from trainer.metrics.tensorboard import TensorBoardWriter

# One save on the way, and steps enough after it for another attempt.
RARE_SAVES = {"steps": 1200, "checkpoint__every_steps": 400, "eval__every_steps": 10_000, "checkpoint__keep_best": 0}


@pytest.fixture
def lock():
    """Forbids writing to a folder, to root as well, or permits it again."""
    locked: list[Path] = []

    def change(folder: Path, forbidden: bool) -> None:
        if (
            shutil.which("chattr") is None
            or subprocess.run(["chattr", "+i" if forbidden else "-i", folder], capture_output=True).returncode
        ):
            pytest.skip("making a folder immutable is not permitted here")
        locked.append(folder)

    yield change
    for folder in locked:
        subprocess.run(["chattr", "-i", folder], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (1 << 16, 1):
            try:
                while stream.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return filler


# TensorBoard's own thread ends with the error, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_points_that_a_full_disk_refuses_are_in_tensorboard_once_there_is_space(small_disk, loss_series, caplog):
    writer = TensorBoardWriter(f"{small_disk}/tensorboard", 1)
    for step in range(1, 6):
        writer.write(step, {"run/loss": float(step)})
    writer.flush()
    filler = fill(small_disk)
    for step in range(6, 400):  # more than what is left of the file's last page
        writer.write(step, {"run/loss": float(step)})
    writer.flush()
    assert "cannot be written for now" in caplog.text
    writer.flush()
    filler.unlink()
    writer.write(400, {"run/loss": 400.0})
    writer.close()
    assert loss_series(small_disk) == [(step, float(step)) for step in range(1, 401)]


def test_a_small_file_on_a_full_disk_stays_what_it_was(small_disk):
    path = epath.Path(small_disk) / "result.json"
    write_file(path, "before")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "after" * 10_000)
    assert path.read_text() == "before"


def test_a_workdir_that_may_be_written_to_again_is_waited_for(tmp_path, lock, monkeypatch):
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        lock(tmp_path, forbidden=len(pauses) < 2)

    monkeypatch.setattr(files.time, "sleep", sleep)
    lock(tmp_path, True)
    with pytest.raises(StorageError, match="cannot be written to"):
        check_workdir(str(tmp_path / "run"))
    check_workdir(str(tmp_path / "run"), retry_seconds=60)
    assert len(pauses) == 2


@pytest.mark.slow
def test_a_run_waits_for_a_dataset_that_is_not_mounted_yet(start_trainer, run_until, finish, dataset_path, tmp_path):
    process = start_trainer(
        tmp_path / "run", steps=2, data__path=tmp_path / "data", faults__storage_retry_seconds=600.0
    )
    run_until(process, "trying again in")
    (tmp_path / "data").symlink_to(dataset_path)
    code, output = finish(process)
    assert code == 0, output


def test_a_dataset_that_stays_away_ends_the_run_with_a_code_that_is_retried(start_trainer, finish, tmp_path):
    code, output = finish(start_trainer(tmp_path, data__path=tmp_path / "data", faults__storage_retry_seconds=0.0))
    assert ExitCode(code).retried and "error: no dataset in" in output and "Traceback" not in output, output


@pytest.mark.slow
def test_a_workdir_that_is_moved_away_ends_the_run_for_good_and_is_not_made_anew(
    start_trainer, run_until, finish, tmp_path
):
    process = start_trainer(tmp_path / "run", faults__storage_retry_seconds=0.0, **RARE_SAVES)
    run_until(process, "step 6 ")
    (tmp_path / "run").rename(tmp_path / "moved")
    code, output = finish(process)
    assert code == EXIT_MISTAKE and "is gone: the workdir was moved" in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_trains_on_while_its_checkpoints_are_forbidden_and_saves_when_they_are_not(
    start_trainer, run_until, finish, tmp_path, lock
):
    process = start_trainer(tmp_path, **RARE_SAVES)
    run_until(process, "step 6 ")
    lock(tmp_path / "checkpoints", True)
    assert "no permission to write to" in run_until(process, "(1 in a row)")
    run_until(process, "step ")  # no checkpoint, but steps
    lock(tmp_path / "checkpoints", False)
    code, output = finish(process)
    assert code == 0 and "(2 in a row)" not in output, output
    assert saved_between(tmp_path, 400, 800)


@pytest.mark.slow
def test_a_run_trains_on_while_its_checkpoints_hang_and_saves_when_they_do_not(
    start_trainer, run_until, finish, tmp_path, freezing_disk
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(freezing_disk.folder)
    process = start_trainer(workdir, checkpoint__timeout_seconds=2, **RARE_SAVES)
    run_until(process, "step 6 ")
    with freezing_disk.frozen():
        assert "took too long" in run_until(process, "(1 in a row)")
        run_until(process, "step ")
    code, output = finish(process)
    assert code == 0 and "(2 in a row)" not in output, output
    assert saved_between(workdir, 400, 800)


@pytest.mark.slow
def test_a_second_save_that_is_forbidden_stops_the_run_and_says_what_to_do(
    start_trainer, run_until, finish, tmp_path, lock
):
    process = start_trainer(tmp_path, steps=100_000)
    run_until(process, "step 6 ")
    lock(tmp_path / "checkpoints", True)
    code, output = finish(process)
    assert code == EXIT_FAILED
    last_words = output.partition("error: two checkpoints in a row could not be saved")[2]
    assert "no permission to write to" in last_words and "Traceback" not in last_words, output


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [8], indirect=True)
def test_a_run_on_a_disk_that_is_full_for_a_while_ends_bit_equal(
    start_trainer, run_until, finish, assert_same_run, small_disk, tmp_path
):
    code, output = finish(start_trainer(tmp_path / "undisturbed", **RARE_SAVES))
    assert code == 0, output
    process = start_trainer(small_disk / "run", **RARE_SAVES)
    run_until(process, "step 6 ")
    filler = fill(small_disk)
    assert "is full" in run_until(process, "(1 in a row)")
    filler.unlink()
    code, output = finish(process)
    assert code == 0, output
    assert_same_run(small_disk / "run", tmp_path / "undisturbed")


def saved_between(workdir: Path, first: int, last: int) -> bool:
    """Whether there is a checkpoint of a step between these two."""
    return any(first < int(path.name) < last for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
