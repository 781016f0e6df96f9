"""The points that TensorBoard shows, after bits flipped and clocks were set back."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import losses
from trainer.metrics import events
from trainer.metrics.tensorboard import TensorBoardWriter


def write(workdir: Path, first: int, last: int) -> Path:
    """One process's points; its file."""
    before = set(workdir.glob("tensorboard/*"))
    writer = TensorBoardWriter(f"{workdir}/tensorboard", first)
    for step in range(first, last + 1):
        writer.write(step, {"run/loss": float(step), "system/data_wait_seconds": 0.5})
    writer.close()
    return max(path for path in set(workdir.glob("tensorboard/*")) - before if not path.name.endswith(events.MENDED))


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.3, 0.302, 0.304, 0.306, 0.308, 0.31, 0.312, 0.314, 0.9])
def test_a_flipped_bit_costs_the_record_that_it_hits_and_no_other(tmp_path, place, caplog):
    first = write(tmp_path, 1, 40)
    flip(first, place)
    assert len(losses(tmp_path)) < 39  # what readers do
    write(tmp_path, 31, 60)
    expected = [(step, float(step)) for step in range(1, 61)]
    shown = losses(tmp_path)
    assert shown == [point for point in expected if point in shown] and len(shown) >= 59
    assert "is damaged" in caplog.text


def test_a_flip_in_the_first_record_hides_nothing(tmp_path):
    flip(write(tmp_path, 1, 20), 0.0)
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"] == []
    write(tmp_path, 21, 30)
    assert losses(tmp_path) == [(step, float(step)) for step in range(1, 31)]


def test_a_file_that_is_whole_or_ends_in_the_middle_of_a_record_is_left_alone(tmp_path):
    write(tmp_path, 1, 20)
    cut = write(tmp_path, 21, 40)
    cut.write_bytes(cut.read_bytes()[:-5])
    write(tmp_path, 31, 60)
    assert losses(tmp_path) == [(step, float(step)) for step in range(1, 61)]
    assert not list(tmp_path.glob(f"tensorboard/*{events.MENDED}"))


def test_a_clock_that_was_set_back_hides_no_point(tmp_path, monkeypatch):
    write(tmp_path, 1, 40)
    now = events.time.time
    monkeypatch.setattr(events.time, "time", lambda: now() - 3600)
    write(tmp_path, 31, 60)
    write(tmp_path, 51, 70)
    assert losses(tmp_path) == [(step, float(step)) for step in range(1, 71)]


# TensorBoard's own thread ends with the error, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_was_moved_away_is_not_made_anew(tmp_path, caplog):
    workdir = tmp_path / "run"
    workdir.mkdir()
    writer = TensorBoardWriter(f"{workdir}/tensorboard", 1)
    workdir.rename(tmp_path / "moved")
    for step in (1, 2, 3):
        writer.write(step, {"run/loss": 1.0})
        writer.flush()
    assert not workdir.exists() and "cannot be written for now" in caplog.text
