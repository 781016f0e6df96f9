"""The file that says where the time went: whatever is in its place, and whatever the clock says."""

import json
import time
from pathlib import Path

import pytest

from trainer import goodput
from trainer.goodput import GOODPUT_FILE, Goodput


def started(workdir: Path) -> Goodput:
    return Goodput(str(workdir), time.monotonic(), is_main=True)


def folder(path: Path) -> None:
    path.mkdir()


def half(path: Path) -> None:
    started(path.parent).write()
    path.write_text(path.read_text()[:40])


def strings(path: Path) -> None:
    started(path.parent).write()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"seconds": dict.fromkeys(content["seconds"], "9")}))


def negative(path: Path) -> None:
    started(path.parent).write()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"starts": -1}))


@pytest.mark.parametrize(
    "spoil",
    [
        folder,
        half,
        strings,
        negative,
        *(lambda path, text=text: path.write_text(text) for text in ("", "[]", "null", "7", "{}", '{"seconds": []}')),
    ],
)
def test_a_file_that_cannot_be_read_is_one_warning_and_counting_begins_anew(tmp_path, caplog, spoil):
    spoil(tmp_path / GOODPUT_FILE)
    started(tmp_path).write()
    assert len(caplog.records) == 1 and "counting anew" in caplog.text
    assert json.loads((tmp_path / GOODPUT_FILE).read_text())["starts"] == 1
    assert len(list(tmp_path.glob(f"{GOODPUT_FILE}.damaged-*"))) == 1  # nothing is lost
    started(tmp_path).write()
    assert json.loads((tmp_path / GOODPUT_FILE).read_text())["starts"] == 2 and len(caplog.records) == 1


def test_no_second_is_negative_after_the_clock_was_set_back(tmp_path, monkeypatch):
    first = started(tmp_path)
    first.add("steps", 50.0)
    first.write()
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(goodput.time, "time", lambda: now() - 3600)
        second = started(tmp_path)
        second.write()
        seconds = second.seconds()
    assert seconds["steps"] == 50 and all(value >= 0 for value in seconds.values())
    assert 0 <= second.scalars()["run/goodput"] <= 1 and "%" in second.summary()


def test_the_seconds_of_all_starts_add_up_to_the_time_that_passed(tmp_path, monkeypatch):
    clock = [1000.0]
    for name in ("time", "monotonic"):
        monkeypatch.setattr(goodput.time, name, lambda: clock[0])
    for _ in range(3):
        run = Goodput(str(tmp_path), clock[0], is_main=True)
        clock[0] += 10
        run.add("steps", 4.0)
        run.write()
        clock[0] += 5
    saved = json.loads((tmp_path / GOODPUT_FILE).read_text())
    assert sum(saved["seconds"].values()) == pytest.approx(40)
    assert (saved["seconds"]["steps"], saved["seconds"]["down"], saved["seconds"]["other"]) == (12, 10, 18)
