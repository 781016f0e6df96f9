"""One page that compares any number of runs, finished or not: losses, differences, configs, time, alarms, masks.

    python -m launch.report runs/demo/selective runs/demo/standard -o report
    python -m launch.report mine=runs/a yours=gs://my-bucket/runs/b --baseline=yours --data=runs/demo/data -o report

Writes DIR/index.html, which needs nothing else: no network, no other file. With --data also what each model writes, and
what it forgets of a sentence.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import DataError
from launch.report.page import render
from launch.report.run import ReportError, Run, checked_baseline, parse_runs, read_run
from launch.report.samples import read_samples
from launch.report.tables import RESULT, result_rows


def write_report(
    runs: Mapping[str, str | Path],
    output_dir: str | Path,
    *,
    dataset_path: str | Path | None = None,
    baseline: str | None = None,
    seed: int = 0,
) -> list[Run]:
    """Writes `output_dir`/index.html, and returns what it shows.

    Args:
      runs: names as the page shows them, and workdirs of `python -m trainer`.
      output_dir: made if it does not exist; its index.html is overwritten.
      dataset_path: the dataset of the runs, whose validation split gives the prompt and the sentence; None leaves both
        out.
      baseline: the name of the run that the others are compared with; None as `checked_baseline`.
      seed: of the samples.

    Returns:
      One Run for each, in the order of `runs`; `terminal_table` prints them.

    Raises:
      ReportError: one is no workdir, `baseline` is none of them, or there are none.
      data.DataError: the dataset cannot be read.
    """
    if not runs:
        raise ReportError("no runs were given; give at least one WORKDIR")
    shown = [read_run(name, str(workdir)) for name, workdir in runs.items()]
    compared = checked_baseline(shown, baseline)
    samples = None if dataset_path is None else read_samples(shown, dataset_path, seed)
    path = Path(output_dir) / "index.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(shown, compared, samples), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--output={output_dir} cannot be written to: {error.strerror}") from error
    return shown


def terminal_table(runs: Sequence[Run]) -> str:
    """The results as text, one line a run under a line of headings."""
    rows = [list(RESULT), *result_rows(runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        texts = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *texts]).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs_help = "a run's folder, or gs://BUCKET/FOLDER, perhaps with a name for the page: NAME=WORKDIR"
    parser.add_argument("runs", nargs="+", metavar="WORKDIR", help=runs_help)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where to write index.html")
    baseline_help = "whose loss is taken from the others' (default: the first run without selection, else the first)"
    parser.add_argument("--baseline", metavar="NAME", help=baseline_help)
    parser.add_argument("--data", metavar="DATASET", help="the dataset folder of the runs, for samples and masks")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    options = parser.parse_args(arguments)
    try:
        runs = write_report(
            parse_runs(options.runs),
            options.output,
            dataset_path=options.data,
            baseline=options.baseline,
            seed=options.seed,
        )
    except (ReportError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(terminal_table(runs))
    for run in runs:
        if run.reason or run.trouble:
            print(f"{run.name}: {'; '.join(filter(None, [run.reason, *run.trouble]))}")
    print(f"the page is {options.output}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
