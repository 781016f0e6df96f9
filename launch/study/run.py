"""Does what a study still lacks, several commands at once; what is there is not done again."""

import os
from collections.abc import Sequence
from pathlib import Path

from launch.commands import InputError
from launch.study.crew import Crew, usable_cores
from launch.study.jobs import Job, unreached
from launch.study.times import TIMES_FILE, read_times, seconds_left

_JOB_BYTES = 2 << 30  # of memory, for one job: more than any of the presets' takes


def default_at_once() -> int:
    """As many jobs as this process may use cores, as far as there is memory for so many."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(usable_cores()), memory // _JOB_BYTES))


def run_jobs(jobs: Sequence[Job], workdir: Path, at_once: int) -> list[str]:
    """Runs those that are not done; of those that can be run, the first in their order goes first. Returns what failed,
    in that order; all others are done.

    Args:
      jobs: In the order of their worth; each comes after those that make what it needs.
      workdir: Of the study, for times and logs.
      at_once: How many are at work at once; each has its share of the cores.

    Raises:
      KeyboardInterrupt: interrupted, by SIGTERM or SIGHUP too. All that was at work was told, and has ended: the
        trainer saves, a search keeps its journal, and the same command goes on.
    """
    crew = Crew(workdir, at_once)
    left, failed = [job for job in jobs if not job.done], dict[str, str]()

    def say(job: Job, what: str) -> None:
        print(f"{jobs.index(job) + 1} of {len(jobs)}, {job.name}: {what}", flush=True)

    with crew.hearing():
        while left and not crew.stopping:
            unmade = {job.output for job in left}
            ready = [job for job in left if job not in crew.at_work and not unmade.intersection(job.needs)]
            without = {job.name: missing for job in ready if (missing := _missing(job))}
            if without:
                left = [job for job in left if job.name not in without]
                for name, missing in without.items():
                    if not all(unreached(path).exists() for path in missing):
                        failed[name] = f"without {', '.join(map(str, missing))}"
            elif ready and crew.has_a_seat:
                say(ready[0], f"begins; what it says is in {crew.start(ready[0])}")
            else:
                job, seconds, message = crew.wait()
                left.remove(job)
                if crew.stopping:
                    break
                if message:
                    failed[job.name] = message
                rest = seconds_left([job.kind for job in left], read_times(workdir), at_once)
                about = "" if rest is None else f"; about {rest / 60:.0f} minutes are left"
                say(job, f"failed: {message}" if message else f"done in {seconds:.0f} s{about}")
    return [f"{job.name}: {failed[job.name]}" for job in jobs if job.name in failed]


def _missing(job: Job) -> list[Path]:
    return [path for path in job.needs if not path.exists()]


def check_workdir(workdir: Path) -> None:
    """Raises InputError if nothing can be written there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / TIMES_FILE).open("a").close()
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written to: {error.strerror}; give another folder") from error
