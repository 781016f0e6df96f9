"""Jobs at work side by side: each in a process of its own with its share of the cores, all told when this one is."""

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from launch.commands import EXIT_INTERRUPTED
from launch.study.jobs import Job, unreached
from launch.study.times import note_time
from trainer.hosts import last_words
from trainer.hosts.interrupt import EXIT_PREEMPTED

LOGS = "logs"  # within the study's folder
_EXIT_UNREACHED = 2
_OUT_OF_REACH = "out of reach"  # in what a search says whose target the model does not meet
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PAUSE_SECONDS = 0.1
_LAST_BYTES = 4096  # of a log, where its last line is looked for


class _Work(NamedTuple):
    job: Job
    seat: int
    log: Path
    began: float


class Crew:
    """So many seats, each with its share of the cores, and who works there."""

    def __init__(self, workdir: Path, seats: int) -> None:
        self.stopping = False
        self._workdir = workdir
        self._working: dict[int, _Work] = {}  # by process
        self._free = list(range(seats))
        cores = sorted(usable_cores())
        self._shares = [set(cores[seat % len(cores) :: seats]) if cores else set[int]() for seat in range(seats)]

    @property
    def at_work(self) -> list[Job]:
        return [work.job for work in self._working.values()]

    @property
    def has_a_seat(self) -> bool:
        return bool(self._free)

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """Within, signals that this process gets are passed on; at its end nobody is at work any more.

        Raises:
          KeyboardInterrupt: at the end, if there was one.
        """
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            if not self.stopping:  # some mistake ends the block early
                self._tell(signal.SIGTERM, list(self._working))
            while self._working:
                self.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopping:
            raise KeyboardInterrupt

    def start(self, job: Job) -> Path:
        """Starts a job on a free seat; returns the file that gets what it says."""
        job.output.parent.mkdir(parents=True, exist_ok=True)
        seat, log = self._free.pop(0), self._workdir / LOGS / f"{job.name.replace(' ', '-').replace(',', '')}.log"
        log.parent.mkdir(exist_ok=True)
        work = _Work(job, seat, log, time.time())
        with log.open("a") as stream:
            print(f"$ {shlex.join(['python', '-m', job.module, *job.arguments])}", file=stream, flush=True)
            with _on_cores(self._shares[seat]):
                process = subprocess.Popen(
                    [sys.executable, "-m", job.module, *job.arguments],
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is passed on, not received twice
                )
        self._working[process.pid] = work
        if self.stopping:  # while it was started
            self._tell(signal.SIGTERM, [process.pid])
        process.returncode = 0  # `wait` looks after it, since it learns what its processor time was
        return log

    def wait(self) -> tuple[Job, float, str]:
        """Waits until some job ends: which, after how many seconds, and what went wrong: empty if nothing did, or the
        target of a search is out of reach, which is a result.
        """
        # Looked at again and again: a signal that comes just before a call that blocks, or to another thread, does not
        # end that call, and would not be heard.
        while (ended := self._ended()) is None:
            time.sleep(_PAUSE_SECONDS)
        process, status, usage = ended
        work, code = self._working.pop(process), os.waitstatus_to_exitcode(status)
        self._free.append(work.seat)
        seconds = time.time() - work.began
        note_time(
            self._workdir,
            {"job": work.job.name, "kind": work.job.kind, "began": work.began, "seconds": seconds,
             "processor_seconds": processor_seconds(usage), "done": code == 0},
        )  # fmt: skip
        if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED) and not self.stopping:  # a signal that it alone got
            self._hear(signal.SIGTERM, None)
        return work.job, seconds, _outcome(work, code)

    def _ended(self) -> tuple[int, int, resource.struct_rusage] | None:
        return next((ended for process in self._working if (ended := os.wait4(process, os.WNOHANG))[0]), None)

    def _hear(self, number: int, frame: object) -> None:
        self.stopping = True
        names = ", ".join(work.job.name for work in self._working.values())
        last_words.say(f"{signal.Signals(number).name}: waiting for what is at work to end: {names or 'nothing'}")
        self._tell(signal.SIGTERM if number == signal.SIGHUP else number, list(self._working))

    @staticmethod
    def _tell(number: int, processes: list[int]) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)


def usable_cores() -> set[int]:
    """The cores that this process may use; none where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def processor_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def _on_cores(share: set[int]) -> Iterator[None]:
    """A process that is started within has these cores, and XLA as many threads."""
    if not share:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _outcome(work: _Work, code: int) -> str:
    if code == 0:
        return "" if work.job.output.exists() else f"it ended without {work.job.output}"
    with work.log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LAST_BYTES))
        line = (stream.read().decode(errors="replace").strip().splitlines() or [""])[-1]
    if code == _EXIT_UNREACHED and work.job.may_miss and _OUT_OF_REACH in line:
        unreached(work.job.output).write_text(line.removeprefix("error: ") + "\n")
        return ""
    return f"exit code {code}: {line}; more in {work.log}"
