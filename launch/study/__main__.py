"""Trains and measures the paper's comparisons at small scale, and makes one page of them.

    python -m launch.study [--preset=small] [--jobs=2] [--workdir=runs/study/small] [--report=report]
        [--markdown=docs/study.md]
    python -m launch.study --collect=gs://my-bucket/runs [--collect=DIR ...] [--preset=paper]

As many commands are at work at once as this process may use cores, each with its share of them; what they say is in
the workdir's `logs`. Run again after an interruption, it goes on where it was. With --collect nothing is trained: the
page is made of the runs that are there, of any size, and says which of the preset's are missing. Exit codes: 0 done,
1 something failed (the last lines say what), 2 a mistake, which one line names, 130 interrupted.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.commands import InputError, Parser, positive, run_to_the_end
from launch.study.cells import PRESETS, paper_runs
from launch.study.crew import processor_seconds
from launch.study.measure import write_json
from launch.study.run import check_workdir, default_at_once, run_jobs
from launch.study.times import DATASET, Time, note_time, read_times

PAPER = "paper"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m launch.study", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    presets = (*PRESETS, PAPER)
    add(
        "--preset",
        choices=presets,
        help=f"which runs; {PAPER}, only with --collect, are configs.list's (default: small)",
    )
    add("--jobs", type=positive, metavar="N", help="commands at work at once (default: one for each core)")
    add("--workdir", type=Path, help="dataset and runs (default: runs/study/PRESET)")
    add("--report", type=Path, default=Path("report"), help="folder of study.html and budgets.html (default: report)")
    add(
        "--markdown",
        type=Path,
        help="the page as Markdown, too, such as docs/study.md; its figures go to a folder beside",
    )
    add("--collect", action="append", default=[], metavar="DIR", help="folder of workdirs, or gs://BUCKET/FOLDER")
    options = parser.parse_args(arguments)
    code = 0

    def run() -> None:
        nonlocal code
        code = _run(options)

    run_to_the_end(run, "the same command goes on")
    sys.exit(code)


def _run(options: argparse.Namespace) -> int:
    if options.markdown and not options.markdown.parent.is_dir():
        raise InputError(f"--markdown={options.markdown}: there is no folder {options.markdown.parent}; make it")
    if options.collect:
        for name in ("workdir", "jobs"):
            if getattr(options, name):
                raise InputError(f"--{name} is of runs to train; --collect alone says where runs are")
        _write(options, options.collect)
        return 0
    if options.preset == PAPER:
        raise InputError("--preset=paper is trained on slices (docs/reproduce.md); give --collect with its runs")
    preset = options.preset or "small"
    workdir = options.workdir or Path("runs/study") / preset
    failed = work(preset, workdir, options.jobs or default_at_once())
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    _write(options, [str(workdir)])
    return 1 if failed else 0


def work(preset: str, workdir: Path, at_once: int) -> list[str]:
    """Makes the dataset, the runs and what is measured of them, as far as they are missing, so many commands at once;
    returns what failed.
    """
    from launch.study.jobs import jobs  # what follows imports JAX
    from launch.study.text import prepare_dataset

    check_workdir(workdir)
    study = PRESETS[preset]
    if not (workdir / "data" / "manifest.json").exists():
        print("== The dataset: what each module's documentation says", flush=True)
        began, before = time.time(), _processor_seconds()
        prepare_dataset(workdir, study.vocab_size, study.record_length)
        line: Time = {
            "job": DATASET, "kind": DATASET, "began": began, "seconds": time.time() - began,
            "processor_seconds": _processor_seconds() - before, "done": True,
        }  # fmt: skip
        note_time(workdir, line)
    todo = jobs(study, workdir)
    print(f"== {sum(not job.done for job in todo)} of {len(todo)} commands are left, {at_once} at once", flush=True)
    return run_jobs(todo, workdir, at_once)


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(processor_seconds(resource.getrusage(who)) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _write(options: argparse.Namespace, folders: list[str]) -> None:
    from launch.study.record import collect
    from launch.study.write import missing, write

    preset = options.preset or ("" if options.collect else "small")
    expected = list(paper_runs()) if preset == PAPER else []
    if preset in PRESETS:
        expected = [run for cell in PRESETS[preset].cells for run in cell.runs]
    command = "python -m launch.study" + (f" --preset={preset}" if preset in PRESETS else "")
    if options.collect:
        command = " ".join(["python -m launch.study", *(f"--collect={folder}" for folder in folders)])
    times = [line for folder in folders if "://" not in folder for line in read_times(Path(folder))]
    record = collect(folders, expected, command, times)
    if commit := _commit():
        record["commit"] = commit
    options.report.mkdir(parents=True, exist_ok=True)
    write_json(options.report / "study.json", record)
    write(record, options.report, options.markdown)
    _write_budgets(folders, options.report)
    if gaps := missing(record):
        print(f"{len(gaps)} of {len(expected)} runs are missing: {', '.join(gaps)}")
    print(f"the page is {options.report}/study.html, its numbers {options.report}/study.json")


def _write_budgets(folders: list[str], report: Path) -> None:
    """The page of `launch.budgets report` about all searches on this machine."""
    found: list[Any] = [
        json.loads(path.read_text())
        for folder in folders
        if "://" not in folder
        for path in sorted(Path(folder).glob("*/study/budgets-*.json"))
    ]
    if found:
        from launch.budgets.report import write_report

        write_report(found, report / "budgets.html")
        print(f"all searches: {report}/budgets.html")


def _commit() -> str:
    """The checkout's commit, marked where files differ from it; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    main()
