"""What is done is not done again, and what fails is told at the end."""

import dataclasses
import json
import os
import signal
import threading

import pytest

from launch.study.cells import PRESETS
from launch.study.jobs import Job, jobs, unreached
from launch.study.run import read_times, run_jobs


def _job(tmp_path, name, *arguments, **more):
    """Writes a zip file, which needs nothing but Python."""
    output = tmp_path / f"{name}.zip"
    return Job("zip", name, "zipfile", arguments or ("-c", str(output), __file__), output, **more)


def test_what_is_there_is_left_alone_and_a_second_start_does_nothing(tmp_path):
    one, two = _job(tmp_path, "one"), _job(tmp_path, "two")
    one.output.write_text("as it was")
    assert run_jobs([one, two], tmp_path) == []
    assert one.output.read_text() == "as it was" and two.output.exists()
    assert [line["job"] for line in read_times(tmp_path)] == ["two"]
    assert run_jobs([one, two], tmp_path) == [] and len(read_times(tmp_path)) == 1


def test_a_failure_is_told_and_what_needs_it_is_left_out(tmp_path):
    bad = _job(tmp_path, "bad", "-t", str(tmp_path / "none.zip"))
    dependent = _job(tmp_path, "dependent", needs=(bad.output,))
    failed = run_jobs([bad, dependent, _job(tmp_path, "good")], tmp_path)
    assert [line.partition(":")[0] for line in failed] == ["bad", "dependent"]
    assert (tmp_path / "good.zip").exists()


def test_a_target_that_is_out_of_reach_is_a_result(tmp_path):
    # A command that ends with exit code 2 and its arguments in the last line of what it says.
    arguments = ("--type", "out of reach")
    search = dataclasses.replace(_job(tmp_path, "search", *arguments), module="calendar", may_miss=True)
    assert run_jobs([search], tmp_path) == []
    assert "out of reach" in unreached(search.output).read_text()
    assert search.done and not search.output.exists()


def test_sigterm_reaches_the_command_and_the_same_start_goes_on(tmp_path):
    output = tmp_path / "made"
    # Reads a pipe that nobody writes to: at work until it is ended.
    os.mkfifo(tmp_path / "pipe")
    job = Job("json", "waits", "json.tool", (str(tmp_path / "pipe"), str(output)), output)

    def end() -> None:
        with (tmp_path / "pipe").open("wb"):  # opens when the command reads
            os.kill(os.getpid(), signal.SIGTERM)
            ended.wait(60)

    ended = threading.Event()
    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], tmp_path)
    ended.set()
    thread.join()
    assert [line["done"] for line in read_times(tmp_path)] == [False]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (tmp_path / "pipe").unlink()
    (tmp_path / "pipe").write_text("{}")
    assert run_jobs([job], tmp_path) == [] and output.exists()


def test_half_a_line_of_times_is_passed_over(tmp_path):
    (tmp_path / "times.jsonl").write_text(json.dumps({"job": "a", "seconds": 1}) + '\n{"job": "b"')
    assert [line["job"] for line in read_times(tmp_path)] == ["a"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_job_of_a_preset_has_an_output_of_its_own_and_needs_what_earlier_ones_make(name, tmp_path):
    made = set()
    for job in jobs(PRESETS[name], tmp_path):
        assert job.output not in made
        assert set(job.needs) <= made
        made.add(job.output)
