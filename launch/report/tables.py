"""The tables of a page: how the runs ended, what differs between their configs, where their time went, their alarms."""

import math
from collections.abc import Sequence
from html import escape

from launch.report import series
from launch.report.alarms import alarms
from launch.report.run import Run
from trainer.goodput import CAUSES, shares, the_rest
from trainer.metrics.terminal import duration
from trainer.settings import free_fields

RESULT = (
    "run",
    "state",
    "validation loss",
    "perplexity",
    "bits per byte",
    "steps",
    "tokens",
    "tokens/s",
    "MFU",
    "goodput",
    "parameters",
)
MAX_ALARMS = 20  # of a run, the newest
ON_THE_WAY = "*"  # marks an evaluation on the way


def result_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each run under RESULT, as text. Throughput and MFU are medians over the run."""
    return [_result_row(run) for run in runs]


def _result_row(run: Run) -> list[str]:
    found, steps = run.validation, run.field("steps")
    way = "" if found is None or found.is_final else ON_THE_WAY
    loss = perplexity = bits = ""
    if found is not None:
        loss, perplexity = f"{found.loss:.4f}{way}", f"{found.perplexity:.2f}{way}"
        bits = "" if math.isnan(found.bits_per_byte) else f"{found.bits_per_byte:.4f}{way}"
    tokens, mfu = run.median("run/tokens_per_second"), run.median("run/mfu")
    return [
        run.name,
        run.state,
        loss,
        perplexity,
        bits,
        f"{run.step:,}" if not steps or steps == run.step else f"{run.step:,} of {steps:,}",
        large(run.step * run.tokens_per_step) if run.tokens_per_step else "",
        "" if tokens is None else f"{tokens:,.0f}",
        "n/a" if mfu is None else f"{mfu:.1%}",
        f"{shares(run.goodput['seconds'])['steps']:.1%}" if run.goodput else "",
        run.parameters,
    ]


def large(number: float) -> str:
    """Such as 6,144, 12.34M or 68.72B."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,.0f}"


def result_section(runs: Sequence[Run]) -> str:
    """How each run ended, or where it is."""
    best = _best(runs)
    rows = []
    for i, (run, cells) in enumerate(zip(runs, result_rows(runs), strict=True)):
        head = f"<tr><th scope=row>{series.key(i)}{escape(cells[0])}<td class=state-{run.state}>{run.state}"
        rows.append(head)
        for heading, cell in zip(RESULT[2:], cells[2:], strict=True):
            css = " class=best" if run is best and heading == "perplexity" else ""
            rows.append(f"<td{css}>{escape(cell)}")
    notes = [f"<b>{escape(run.name)}</b> {run.state}: {escape(run.reason)}." for run in runs if run.reason]
    notes += [f"<b>{escape(run.name)}</b>: {escape(trouble)}." for run in runs for trouble in run.trouble]
    if any(ON_THE_WAY in cell for row in result_rows(runs) for cell in row[2:5]):
        notes.append("* The last evaluation on the way, over a part of the validation split.")
    return (
        f"<section><h2>Result</h2>{_table(RESULT, rows)}"
        + "".join(f"<p class=note>{note}</p>" for note in notes)
        + "<p class=note>Perplexity is e to the power of the loss, over the whole validation split. Bits per byte also "
        "compare runs of different vocabularies. Tokens/s and MFU are medians over the run; MFU is n/a on devices "
        "whose peak is not known.</p></section>"
    )


def _best(runs: Sequence[Run]) -> Run | None:
    """The finished run of lowest perplexity, where several can be compared."""
    finished = [run for run in runs if run.validation is not None and run.validation.is_final]
    if len(finished) < 2 or len({(run.fingerprint, run.field("model.vocab_size")) for run in finished}) > 1:
        return None
    return min(finished, key=lambda run: run.validation.perplexity if run.validation else math.inf)


def differing_fields(runs: Sequence[Run]) -> dict[str, list[object]]:
    """The values of those config fields that are not the same for all runs whose config is known, None where it is not;
    first what changes the mathematics.
    """
    known = [run for run in runs if run.metrics.hparams]
    names = list(dict.fromkeys(name for run in known for name in run.metrics.hparams))
    differ = [name for name in names if len({repr(run.field(name)) for run in known}) > 1]
    differ.sort(key=_is_free)
    return {name: [run.field(name) for run in runs] for name in differ}


def _is_free(name: str) -> bool:
    """Whether a field is about how and where a run is computed."""
    return any(name == free or name.startswith(f"{free}.") for free in free_fields())


def config_section(runs: Sequence[Run]) -> str:
    """Fields that differ; empty for one run alone."""
    if len(runs) < 2:
        return ""
    rows = []
    for name, values in differing_fields(runs).items():
        css = " class=free" if _is_free(name) else ""
        cells = "".join(f"<td>{escape(_value(value))}" for value in values)
        rows.append(f"<tr{css}><th scope=row>{escape(name)}{cells}")
    fingerprints = [run.fingerprint for run in runs]
    if len(set(filter(None, fingerprints))) > 1:
        cells = "".join(f"<td>{escape(fingerprint[:12])}" for fingerprint in fingerprints)
        rows.append(f"<tr><th scope=row>dataset&rsquo;s fingerprint{cells}")
    if not rows:
        text = "<p class=note>Nothing: all fields are the same.</p>"
    else:
        text = _table(("field", *(run.name for run in runs)), rows) + (
            "<p class=note>All other fields are the same. Faint: how and where it is computed, which changes no "
            "number.</p>"
        )
    return f"<section><h2>What differs in the configs</h2>{text}</section>"


def _value(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def goodput_section(runs: Sequence[Run]) -> str:
    """Seconds by cause as a bar for each run, and its starts."""
    keys = "".join(f"<span><span class='key c{i}'></span>{_words(cause)}</span>" for i, cause in enumerate(CAUSES))
    bars = "".join(_bar(run, i) for i, run in enumerate(runs))
    return (
        f"<section><h2>Where the time went</h2><p class=legend>{keys}</p>{bars}<p class=note>All time since the first "
        "start. Goodput is the share of steps made for the first time; repeated steps were lost with the process that "
        "made them; stalls are what steps took beyond three times their median.</p></section>"
    )


def _bar(run: Run, number: int) -> str:
    head = f"<figure class=goodput><figcaption>{series.key(number)}{escape(run.name)}</figcaption>"
    if run.goodput is None:
        return f"{head}<p class=note>Not known: there is no goodput.json that can be read.</p></figure>"
    seconds = run.goodput["seconds"]
    of_all = shares(seconds)
    parts = "".join(
        f"<span class=c{i} style='width:{100 * of_all[cause]:.2f}%' title='{_words(cause)}: "
        f"{duration(seconds[cause])}, {of_all[cause]:.1%}'></span>"
        for i, cause in enumerate(CAUSES)
        if seconds[cause] > 0
    )
    text = f"goodput {of_all['steps']:.1%} of {duration(sum(seconds.values()))}; the rest: {the_rest(seconds)}"
    again = [f"{begin.first_step:,}" for begin in run.metrics.begins[1:] if not begin.is_rollback]
    if again:
        earlier = f"{len(again) - 10} times before, " if len(again) > 10 else ""
        text += f". Started again at step {earlier}{', '.join(again[-10:])}"
    return f"{head}<div class=bar>{parts}</div><p class=note>{text}.</p></figure>"


def _words(cause: str) -> str:
    return cause.replace("_", " ")


def alarms_section(runs: Sequence[Run]) -> str:
    """All alarms, by run."""
    rows = []
    for number, run in enumerate(runs):
        found = alarms(run)
        for alarm in found[-MAX_ALARMS:]:
            head = f"<tr><th scope=row>{series.key(number)}{escape(run.name)}"
            rows.append(f"{head}<td>{alarm.steps}<td class=words>{escape(alarm.says)}")
        if len(found) > MAX_ALARMS:
            rows.append(f"<tr><th scope=row>{escape(run.name)}<td><td class=words>{len(found) - MAX_ALARMS} earlier")
    text = _table(("run", "when", "what"), rows) if rows else "<p class=note>None.</p>"
    return f"<section><h2>Alarms</h2>{text}</section>"


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    """`headings` are escaped here, `rows` are HTML."""
    head = "".join(f"<th scope=col>{escape(heading)}" for heading in headings)
    return f"<div class=scroll><table><thead><tr>{head}<tbody>{''.join(rows)}</table></div>"
