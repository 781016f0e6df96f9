"""What is done is not done again, the order is kept with several at work, and what fails is told at the end."""

import dataclasses
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.study import run as study_run
from launch.study.cells import PRESETS
from launch.study.jobs import Job, jobs, unreached
from launch.study.run import run_jobs
from launch.study.times import clock_seconds, most_at_once, read_times, seconds_left

SECONDS = 60


def _job(folder: Path, name: str, *arguments: str, **more) -> Job:
    """Writes a zip file, which needs nothing but Python."""
    output = folder / f"{name}.zip"
    return Job("zip", name, "zipfile", arguments or ("-c", str(output), __file__), output, **more)


def _waiting(folder: Path, name: str, **more) -> Job:
    """Is at work until somebody writes JSON to the pipe of its name."""
    os.mkfifo(folder / f"{name}.pipe")
    output = folder / f"{name}.json"
    return Job("json", name, "json.tool", (str(folder / f"{name}.pipe"), str(output)), output, **more)


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """`act` in a thread; what it raises is raised at the end."""
    errors = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)
            subprocess.run(["kill", str(os.getpid())], check=True)  # ends what would wait for ever

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(SECONDS)
        if errors:
            raise errors[0]


def _is_read(folder: Path, name: str) -> bool:
    try:
        os.close(os.open(folder / f"{name}.pipe", os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_what_is_there_is_left_alone_and_a_second_start_does_nothing(tmp_path):
    one, two = _job(tmp_path, "one"), _job(tmp_path, "two")
    one.output.write_text("as it was")
    assert run_jobs([one, two], tmp_path, 1) == []
    assert one.output.read_text() == "as it was" and two.output.exists()
    assert [line["job"] for line in read_times(tmp_path)] == ["two"]
    assert run_jobs([one, two], tmp_path, 1) == [] and len(read_times(tmp_path)) == 1


def test_as_many_are_at_work_as_asked_the_first_ones_and_none_before_what_it_needs(tmp_path):
    one, two = _waiting(tmp_path, "one"), _waiting(tmp_path, "two")
    needy, three = _waiting(tmp_path, "needy", needs=(two.output,)), _waiting(tmp_path, "three")
    late = _waiting(tmp_path, "late")

    def act() -> None:
        with (tmp_path / "one.pipe").open("w") as first, (tmp_path / "two.pipe").open("w") as second:
            assert not any(_is_read(tmp_path, name) for name in ("needy", "three", "late"))  # two are at work
            first.write("{}")
            first.close()
            with (tmp_path / "three.pipe").open("w") as third:  # what `needy` needs is not there yet
                assert not any(_is_read(tmp_path, name) for name in ("needy", "late"))
                second.write("{}")
                second.close()
                with (tmp_path / "needy.pipe").open("w") as fourth:  # before `late`, which is worth less
                    assert not _is_read(tmp_path, "late")
                    third.write("{}")
                    fourth.write("{}")
        (tmp_path / "late.pipe").write_text("{}")

    with _meanwhile(act):
        assert run_jobs([one, two, needy, three, late], tmp_path, 2) == []
    assert most_at_once(read_times(tmp_path)) == 2


def test_each_has_its_share_of_the_cores_and_they_are_all_given_back(tmp_path):
    cores = os.sched_getaffinity(0)
    found = []
    for name in ("one", "two"):
        output = tmp_path / name
        says = f"import os, pathlib; pathlib.Path({str(output)!r}).write_text(str(sorted(os.sched_getaffinity(0))))"
        found.append(Job("core", name, "timeit", ("-n1", "-r1", says), output))
    assert run_jobs(found, tmp_path, len(cores)) == []
    assert all(len(json.loads(job.output.read_text())) == 1 for job in found)
    found[0].output.unlink()
    assert run_jobs(found, tmp_path, 1) == []
    assert json.loads(found[0].output.read_text()) == sorted(cores) == sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(("cores", "gibibytes", "expected"), [(8, 64, 8), (8, 5, 2), (1, 64, 1), (0, 64, 1), (4, 1, 1)])
def test_by_default_as_many_as_cores_and_memory_allow(cores, gibibytes, expected, monkeypatch):
    monkeypatch.setattr(study_run, "usable_cores", lambda: set(range(cores)))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gibibytes << 18}.get)
    assert study_run.default_at_once() == expected


def test_a_failure_is_told_hides_nothing_and_what_needs_it_is_left_out(tmp_path, capfd):
    bad = _job(tmp_path, "bad", "-t", str(tmp_path / "none.zip"))
    dependent = _job(tmp_path, "dependent", needs=(bad.output,))
    more = _job(tmp_path, "more", needs=(dependent.output,))
    failed = run_jobs([bad, dependent, more, _job(tmp_path, "good"), _job(tmp_path, "late")], tmp_path, 2)
    assert [line.partition(":")[0] for line in failed] == ["bad", "dependent", "more"]
    assert (tmp_path / "good.zip").exists() and (tmp_path / "late.zip").exists()
    said, log = capfd.readouterr().out, (tmp_path / "logs/bad.log").read_text()
    assert "No such file" in failed[0] and "none.zip" in log
    assert "1 of 5, bad: failed: exit code 1" in said and "Traceback" in log and "Traceback" not in said


def test_a_target_that_is_out_of_reach_is_a_result(tmp_path):
    # A command that ends with exit code 2 and its arguments in the last line of what it says.
    arguments = ("--type", "out of reach")
    search = dataclasses.replace(_job(tmp_path, "search", *arguments), module="calendar", may_miss=True)
    dependent = _job(tmp_path, "dependent", needs=(search.output,))
    assert run_jobs([search, dependent], tmp_path, 1) == []
    assert "out of reach" in unreached(search.output).read_text()
    assert search.done and not search.output.exists() and not dependent.done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_all_that_is_at_work_and_the_same_start_goes_on(number, tmp_path):
    found = [_waiting(tmp_path, name) for name in ("one", "two", "late")]
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    ended = threading.Event()

    def end() -> None:
        with (tmp_path / "one.pipe").open("w"), (tmp_path / "two.pipe").open("w"):
            subprocess.run(["kill", f"-{number:d}", str(os.getpid())], check=True)  # comes to the main thread
            assert ended.wait(SECONDS)

    with _meanwhile(end):
        with pytest.raises(KeyboardInterrupt):
            run_jobs(found, tmp_path, 2)
        ended.set()
    assert sorted((line["job"], line["done"]) for line in read_times(tmp_path)) == [("one", False), ("two", False)]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    for job in found:
        (tmp_path / f"{job.name}.pipe").unlink()
        (tmp_path / f"{job.name}.pipe").write_text("{}")
    assert run_jobs(found, tmp_path, 2) == [] and all(job.done for job in found)


def test_a_signal_that_one_alone_got_ends_the_others(tmp_path, monkeypatch):
    waiting = _waiting(tmp_path, "waits")
    (tmp_path / "quits.py").write_text("raise SystemExit(130)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    interrupted = Job("exit", "interrupted", "quits", (), tmp_path / "none")
    with pytest.raises(KeyboardInterrupt):
        run_jobs([waiting, interrupted], tmp_path, 2)
    assert {line["job"] for line in read_times(tmp_path)} == {"waits", "interrupted"}


def _times(*jobs: tuple[float, float]) -> list:
    return [
        {"job": "", "kind": "a", "began": began, "seconds": seconds, "processor_seconds": 0.0, "done": True}
        for began, seconds in jobs
    ]


def test_by_the_clock_what_ran_at_once_counts_once_and_pauses_do_not():
    times = _times((100, 10), (105, 20), (110, 5), (200, 1))
    assert clock_seconds(times) == 26
    assert most_at_once(times) == 2 and most_at_once(_times((1, 2), (3, 2))) == 1 and most_at_once([]) == 0
    assert seconds_left(["a", "a", "new"], times, 2) == 3 * 9 / 2 and seconds_left(["a"], [], 2) is None


def test_half_a_line_of_times_is_passed_over_and_lines_without_a_beginning_come_one_after_the_other(tmp_path):
    (tmp_path / "times.jsonl").write_text('{"job": "a", "seconds": 1}\n{"job": "b", "seconds": 2}\n{"job": "c"')
    found = read_times(tmp_path)
    assert [line["job"] for line in found] == ["a", "b"] and clock_seconds(found) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_job_of_a_preset_has_an_output_of_its_own_and_needs_what_earlier_ones_make(name, tmp_path):
    made, found = set(), jobs(PRESETS[name], tmp_path)
    for job in found:
        assert job.output not in made
        assert set(job.needs) <= made
        made.add(job.output)
    assert len({job.name for job in found}) == len(found)  # so have their logs
