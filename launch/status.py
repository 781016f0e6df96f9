"""What runs are doing, in ten lines each, for those with a terminal and no browser. Reads their files, changes nothing.

python -m launch.status runs/mine gs://my-bucket/runs/c4-d12
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence

from launch.report.alarms import alarms
from launch.report.run import ReportError, Run, last_checkpoint, parse_runs, read_run
from trainer.goodput import shares, the_rest
from trainer.metrics.terminal import duration

_MOST_ALARMS = 3  # shown, the newest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 2 if one of the folders is no workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run: a folder or gs://BUCKET/FOLDER")
    options = parser.parse_args(arguments)
    code = 0
    try:
        runs = parse_runs(options.workdirs)
    except ReportError as error:
        parser.error(str(error))
    for number, (name, workdir) in enumerate(runs.items()):
        try:
            text = status(read_run(name, workdir))
        except ReportError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        else:
            print(text if number == 0 else f"\n{text}", flush=True)
    return code


def status(run: Run) -> str:
    """About ten lines."""
    lines = {
        "run": f"{run.name}, in {run.workdir}",
        "state": run.state + (f": {run.reason}" if run.reason else ""),
        "step": _step(run),
        "training": _training(run),
        "validation": _validation(run),
        "speed": _speed(run),
        "goodput": _goodput(run),
        "restarts": _restarts(run),
        "checkpoint": _checkpoint(run),
        "alarms": _alarms(run),
    }
    if run.trouble:
        lines["trouble"] = "; ".join(run.trouble)
    return "\n".join(f"{name:<11} {line}" for name, line in lines.items())


def _step(run: Run) -> str:
    steps = run.field("steps")
    if not steps:
        return f"{run.step:,}"
    text = f"{run.step:,} of {steps:,} ({run.step / steps:.1%})"
    if run.tokens_per_step:
        text += f", {run.step * run.tokens_per_step:,} tokens"
    seconds = run.newest("run/step_seconds_median")
    if run.state == "running" and seconds is not None:
        text += f", {duration((steps - run.step) * seconds)} left"
    return text


def _training(run: Run) -> str:
    loss, bits = run.newest("run/loss"), run.newest("run/bits_per_byte")
    if loss is None:
        return "nothing yet"
    written = duration(max(0.0, time.time() - run.series("run/loss").times[-1]))
    return f"loss {loss:.4f}" + (f", {bits:.4f} bits per byte" if bits is not None else "") + f", {written} ago"


def _validation(run: Run) -> str:
    found = run.validation
    if found is None:
        return "none yet"
    where = "over the whole split" if found.is_final else f"at step {found.step:,}"
    bits = "" if math.isnan(found.bits_per_byte) else f", {found.bits_per_byte:.4f} bits per byte"
    return f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}{bits}, {where}"


def _speed(run: Run) -> str:
    tokens, mfu = run.newest("run/tokens_per_second"), run.newest("run/mfu")
    median, p99 = run.newest("run/step_seconds_median"), run.newest("run/step_seconds_p99")
    if tokens is None:
        return "not measured"
    text = f"{tokens:,.0f} tokens/s, MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"
    return text if median is None or p99 is None else f"{text}, a step {median:.3f} s, p99 {p99:.3f} s"


def _goodput(run: Run) -> str:
    if run.goodput is None:
        return "not known"
    seconds = run.goodput["seconds"]
    return f"{shares(seconds)['steps']:.0%} of {duration(sum(seconds.values()))}; the rest: {the_rest(seconds)}"


def _restarts(run: Run) -> str:
    again = [begin for begin in run.metrics.begins[1:] if not begin.is_rollback]
    if not again:
        return "none"
    ago = duration(max(0.0, time.time() - again[-1].time))
    return f"{len(again)}, the last at step {again[-1].first_step:,}, {ago} ago"


def _checkpoint(run: Run) -> str:
    found = last_checkpoint(run.workdir)
    if found is None:
        return "none"
    step, age = found
    return f"step {step:,}" + ("" if math.isnan(age) else f", {duration(age)} old")


def _alarms(run: Run) -> str:
    found = alarms(run)
    if not found:
        return "none"
    earlier = f"; {len(found) - _MOST_ALARMS} earlier" if len(found) > _MOST_ALARMS else ""
    return "; ".join(f"{alarm.steps}: {alarm.says}" for alarm in found[: -_MOST_ALARMS - 1 : -1]) + earlier


if __name__ == "__main__":
    sys.exit(main())
