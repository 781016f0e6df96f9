"""The losses of all runs, and their differences to one run."""

from collections.abc import Sequence
from html import escape

from launch.report import series
from launch.report.alarms import alarms
from launch.report.plot import AXES, MAX_RAW, Curve, Line, plots
from launch.report.run import Run

MAX_MARKS = 30  # alarms, and restarts, of a run


def curves_section(runs: Sequence[Run]) -> str:
    """The losses."""
    lines = [
        Line(run.name, i, loss := Curve.of(run, "run/loss"), Curve.of(run, "run/validation_loss"), _marks(run, loss))
        for i, run in enumerate(runs)
    ]
    raw = "Faint: the training loss of each step. " if len(runs) <= MAX_RAW else ""
    return (
        f"<section><h2>Loss</h2>{_switch()}{series.legend([run.name for run in runs])}"
        + plots(lines, "loss, nats per token", "Loss")
        + f"<p class=note>{raw}Lines: the training loss, its mean over a 25th of the run. Dots: the validation "
        "loss. Upright strokes: the run was started again, or went back. &#9650;: an alarm; all are listed below. "
        "Lower is better.</p></section>"
    )


def difference_section(runs: Sequence[Run], baseline: Run) -> str:
    """What each run's loss is above or below the baseline's, at the same tokens; empty for one run alone."""
    if len(runs) < 2:
        return ""
    lines, notes, rows = [], [], []
    losses = {name: Curve.of(baseline, name) for name in ("run/loss", "run/validation_loss")}
    for i, run in enumerate(runs):
        if run is baseline:
            continue
        if reason := incomparable(run, baseline):
            notes.append(f"{run.name} {reason}: nats per token do not compare; bits per byte may")
            continue
        raw, validation = (Curve.of(run, name).minus(curve) for name, curve in losses.items())
        lines.append(Line(run.name, i, raw, validation))
        rows.append(_difference_row(run, i, raw, validation))
        if reason := _other_batches(run, baseline):
            notes.append(f"{run.name} {reason}, so it saw other batches, and the noise of training does not cancel out")
    text = plots(lines, "difference, nats per token", "Difference of the losses", zero=True) if lines else ""
    if rows:
        headings = "<th scope=col>run<th scope=col>training, last tenth<th scope=col>validation<th scope=col>at step"
        text += f"<div class=scroll><table><thead><tr>{headings}<tbody>{''.join(rows)}</table></div>"
    name = escape(baseline.name)
    return (
        f"<section><h2>Difference to {name}</h2>{text}<p class=note>Loss of a run minus that of {name} where both have "
        f"seen as many tokens: below zero it is better than {name}. Runs of one dataset, seed and batch see the same "
        "batches, so the noise that they share cancels out. Lines and dots as above; the table has means over the last "
        f"tenth of what they share, and the last validation that both made.</p>{_notes(notes)}</section>"
    )


def incomparable(run: Run, baseline: Run) -> str:
    """Why the losses of two runs mean different things; empty if they do not."""
    sizes = [one.field("model.vocab_size") for one in (run, baseline)]
    if None not in sizes and sizes[0] != sizes[1]:
        return f"has another vocabulary, of {sizes[0]:,} token ids instead of {sizes[1]:,}"
    if run.fingerprint and baseline.fingerprint and run.fingerprint != baseline.fingerprint:
        return "was trained on another dataset"
    return ""


def _other_batches(run: Run, baseline: Run) -> str:
    names = [n for n in ("seed", "batch_size", "context_length") if run.field(n) != baseline.field(n)]
    return f"has another {' and '.join(names).replace('_', ' ')}" if names else ""


def _notes(notes: Sequence[str]) -> str:
    return "".join(f"<p class=note>{escape(note)}.</p>" for note in notes)


def last_tenth(difference: Curve) -> float | None:
    """The mean of a difference over the last tenth of its points."""
    count = len(difference.values)
    return float(difference.values[-max(1, count // 10) :].mean()) if count else None


def _difference_row(run: Run, number: int, raw: Curve, validation: Curve) -> str:
    training = last_tenth(raw)
    cells = ["none" if training is None else f"{training:+.4f}", "none", ""]
    if len(validation.steps):
        cells[1:] = [f"{validation.values[-1]:+.4f}", f"{validation.steps[-1]:,}"]
    name = f"{series.key(number)}{escape(run.name)}"
    return f"<tr><th scope=row>{name}{''.join(f'<td>{cell}' for cell in cells)}"


def _marks(run: Run, loss: Curve) -> list[tuple[Curve, str, str]]:
    smooth, marks = loss.smoothed(), []
    for begin in run.metrics.begins[1:]:
        what = "went back to" if begin.is_rollback else "was started again at"
        marks.append((smooth.near(begin.first_step), "restart", f"{run.name} {what} step {begin.first_step:,}"))
    marks = marks[-MAX_MARKS:]
    for alarm in alarms(run)[-MAX_MARKS:]:
        marks.append((smooth.near(alarm.first_step), "alarm", f"{run.name}, {alarm.steps}: {alarm.says}"))
    return [mark for mark in marks if len(mark[0].steps)]


def _switch() -> str:
    choices = "".join(
        f"<label><input type=radio name=axis id=by-{axis} {'checked' if axis == 'steps' else ''}> {axis}</label>"
        for axis in AXES
    )
    return f"<p class=switch>Against {choices}</p>"
