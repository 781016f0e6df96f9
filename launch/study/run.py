"""Does what a study still lacks, one command after the other; what is there is not done again."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.commands import EXIT_INTERRUPTED, InputError
from launch.study.jobs import Job, unreached
from trainer.hosts.interrupt import EXIT_PREEMPTED

TIMES_FILE = "times.jsonl"  # within the study's folder: what each job took
EXIT_UNREACHED = 2
_OUT_OF_REACH = "out of reach"  # in what a search says whose target the model does not meet


def run_jobs(jobs: Sequence[Job], workdir: Path) -> list[str]:
    """Runs those that are not done. Returns what failed; the others are done.

    Raises:
      KeyboardInterrupt: interrupted, by SIGTERM too. The trainer saves, a search keeps its journal, and the same
        command goes on.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        if job.done:
            continue
        if missing := [path for path in job.needs if not path.exists()]:
            if not all(unreached(path).exists() for path in missing):
                failed.append(f"{job.name}: without {', '.join(map(str, missing))}")
            continue
        left = _remaining([job for job in jobs if not job.done], workdir)
        print(f"\n== {number} of {len(jobs)}: {job.name}{left}\n$ {_shown(job)}", flush=True)
        if message := _run(job, workdir):
            failed.append(f"{job.name}: {message}")
            print(f"failed: {message}", flush=True)
    return failed


def read_times(workdir: Path) -> list[dict[str, object]]:
    """What jobs took: "job", "kind", "seconds" of the clock and "processor_seconds", "done"."""
    path = workdir / TIMES_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off
            continue
    return found


def note_time(workdir: Path, job: str, kind: str, began: float, processor: float, *, done: bool) -> None:
    """Adds a line to the times: `began` by the monotonic clock, `processor` as `processor_seconds` said then."""
    line = {
        "job": job, "kind": kind, "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(processor_seconds() - processor, 1), "done": done,
    }  # fmt: skip
    with (workdir / TIMES_FILE).open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _run(job: Job, workdir: Path) -> str:
    """What went wrong; empty if nothing did, or the target of a search is out of reach, which is a result."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    began, processor = time.monotonic(), processor_seconds()
    command = [sys.executable, "-m", job.module, *job.arguments]
    errors = subprocess.PIPE if job.may_miss else None
    started: list[subprocess.Popen[str]] = []

    def pass_on(number: int, frame: object) -> None:
        for process in started:
            process.send_signal(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, pass_on)
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=errors, text=True)
    started.append(process)
    try:
        _, said = process.communicate()
    except KeyboardInterrupt:  # a terminal's Ctrl-C reached the process, too
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        note_time(workdir, job.name, job.kind, began, processor, done=process.returncode == 0)
    if process.returncode in (EXIT_PREEMPTED, EXIT_INTERRUPTED):  # a signal that it alone got
        raise KeyboardInterrupt
    if process.returncode == 0:
        return "" if job.output.exists() else f"it ended without {job.output}"
    line = (said or "").strip().splitlines()[-1:]
    if process.returncode == EXIT_UNREACHED and line and _OUT_OF_REACH in line[0]:
        print(line[0], flush=True)
        unreached(job.output).write_text(line[0].removeprefix("error: ") + "\n")
        return ""
    return f"exit code {process.returncode}{': ' + line[0] if line else ''}"


def _shown(job: Job) -> str:
    return shlex.join(["python", "-m", job.module, *job.arguments])


def _remaining(missing: Sequence[Job], workdir: Path) -> str:
    """How long is left, by what jobs of the same kind have taken, else by the mean of all jobs."""
    times: dict[str, list[float]] = {}
    for line in read_times(workdir):
        if line["done"] and line["kind"] != "dataset":
            times.setdefault(str(line["kind"]), []).append(float(str(line["seconds"])))
    everything = [seconds for of_kind in times.values() for seconds in of_kind]
    if not everything:
        return ""
    mean = sum(everything) / len(everything)
    left = sum(sum(times[job.kind]) / len(times[job.kind]) if job.kind in times else mean for job in missing)
    return f" (about {left / 60:.0f} minutes are left)"


def check_workdir(workdir: Path) -> None:
    """Raises InputError if nothing can be written there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / TIMES_FILE).open("a").close()
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written to: {error.strerror}; give another folder") from error
