"""What an evaluation found: means with their standard errors, paired differences, a table, a file and a plot."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from inference_budget import POLICIES
from launch import charts
from launch.commands import InputError

from .items import Measurement

FORMAT = "launch.evaluate/1"
SHARES = ("acc", "acc_norm", "acc_bytes", "exact")  # of items, so that Wilson's interval holds
FULL = "full cache"
LINES = ("solid", "dashed", "dotted")  # of a policy's dtypes


class Mean(TypedDict):
    """Of a metric, or of a difference, over items."""

    value: float
    standard_error: float | None


class TaskResult(TypedDict):
    """One task with one cache."""

    chance: float | None  # the accuracy of choosing blindly
    metrics: dict[str, Mean]
    minus_full_cache: dict[str, Mean]  # of the pairs; empty for the full cache itself
    minus_other: dict[str, Mean]  # the same, of the file that was given to compare with
    items: dict[str, dict[str, float]]  # by metric, then by item


class CacheResult(TypedDict):
    """Everything that was measured with one cache."""

    cache: str  # FULL, or the policy and the memory factor, and the dtype if one was asked for
    policy: str | None
    cache_dtype: str | None  # of keys and values; None for the model's
    memory_factor: float
    budgets: list[int]
    tasks: dict[str, TaskResult]


class ResultsFile(TypedDict):
    """What `--output` writes."""

    format: str
    checkpoint: dict[str, str]  # path and fingerprint
    context_length: int
    results: list[CacheResult]


def mean(values: Sequence[float]) -> Mean:
    """With the standard error sd / sqrt(n), where n is at least 2."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": float(np.mean(values)), "standard_error": error}


def task_result(found: Measurement) -> TaskResult:
    metrics = {name: mean(list(by_item.values())) for name, by_item in found.values.items()}
    totals: dict[str, Mean] = {
        name: {"value": value, "standard_error": error} for name, (value, error) in found.totals.items()
    }
    return {
        "chance": found.chance,
        "metrics": metrics | totals,
        "minus_full_cache": {},
        "minus_other": {},
        "items": found.values,
    }


def differences(one: TaskResult, other: TaskResult) -> dict[str, Mean]:
    """`one` minus `other`, on the items that both have: the mean, and its standard error from the pairs."""
    found = {}
    for metric in one["items"].keys() & other["items"].keys():
        mine, others = one["items"][metric], other["items"][metric]
        if common := sorted(mine.keys() & others.keys()):
            found[metric] = mean([mine[key] - others[key] for key in common])
    return {metric: found[metric] for metric in one["metrics"] if metric in found}


def interval(metric: str, value: Mean, items: int) -> tuple[float, float] | None:
    """95%: Wilson's for a share of items, else normal; None without a standard error."""
    if metric in SHARES and items:
        z2, p = 1.96**2 / items, value["value"]
        half = 1.96 * math.sqrt(p * (1 - p) / items + z2 / (4 * items))
        return (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)
    if value["standard_error"] is None:
        return None
    half = 1.96 * value["standard_error"]
    return value["value"] - half, value["value"] + half


def rows(results: Sequence[CacheResult]) -> Iterator[str]:
    """The table, a task after the other."""
    for task, of_first in results[0]["tasks"].items():
        number = max((len(by_item) for by_item in of_first["items"].values()), default=0)
        chance = "" if of_first["chance"] is None else f", acc by chance {of_first['chance']:.3f}"
        yield f"{task}: {number:,} items{chance}" if number else task
        for result in results:
            found = result["tasks"][task]
            yield f"  {result['cache']}"
            for metric, value in found["metrics"].items():
                within = interval(metric, value, len(found["items"].get(metric, {})))
                between = f", 95% {within[0]:.4f} to {within[1]:.4f}" if within else ""
                less = "".join(
                    f"; minus {name} {_shown(others[metric], '+.4f')}"
                    for name, others in (
                        (FULL, found["minus_full_cache"]),
                        ("--against", found["minus_other"]),
                    )
                    if metric in others
                )
                yield f"    {metric:<14} {_shown(value, '.4f')}{between}{less}"


def _line(result: CacheResult) -> tuple[str, str | None]:
    """What one line of the plot has: the policy and the dtype."""
    return result["policy"] or "", result["cache_dtype"]


def _shown(value: Mean, form: str) -> str:
    error = value["standard_error"]
    return format(value["value"], form) + (f" ± {error:.4f}" if error is not None else "")


def write_results(path: str | Path, content: ResultsFile) -> None:
    """At once: an interruption leaves no half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(path: str | Path) -> ResultsFile:
    """Raises InputError if it is no file of `--output`."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--against={path} cannot be read: {error}; give a file of --output") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"--against={path} does not say that its format is {FORMAT!r}; give a file of --output")
    return content  # type: ignore[return-value]


def compare(results: Sequence[CacheResult], other: ResultsFile | None) -> None:
    """Fills in the differences: from the full cache, and from the other file's result of the same cache, or its first.

    Raises:
      InputError: the other file has none of these tasks.
    """
    for result in results[1:]:
        for task, found in result["tasks"].items():
            found["minus_full_cache"] = differences(found, results[0]["tasks"][task])
    if other is None:
        return
    of_cache: Mapping[str, CacheResult] = {result["cache"]: result for result in other["results"]}
    compared = 0
    for result in results:
        theirs = of_cache.get(result["cache"], other["results"][0])["tasks"]
        for task in result["tasks"].keys() & theirs.keys():
            result["tasks"][task]["minus_other"] = differences(result["tasks"][task], theirs[task])
            compared += bool(result["tasks"][task]["minus_other"])
    if not compared:
        tasks = ", ".join(other["results"][0]["tasks"])
        raise InputError(f"--against has no items of these tasks; it has {tasks}")


def plot(path: str | Path, results: Sequence[CacheResult]) -> None:
    """A PNG: for each task its first metric, and its bits per byte, which small models move first, against the memory
    factor, a line for each policy and dtype, bars of 95%.
    """
    panels = [
        (task, metric)
        for task, found in results[0]["tasks"].items()
        for number, metric in enumerate(found["metrics"])
        if number == 0 or metric == "bits_per_byte"
    ]
    names = list(dict.fromkeys(_line(result) for result in results[1:] if result["policy"])) or [("", None)]
    named = list(POLICIES)[: len(charts.SERIES)]
    columns = min(len(panels), 2)
    width, height = 440, 300
    figure = charts.new_figure(columns * width, 40 + -(-len(panels) // columns) * height, "white")
    for number, (task, metric) in enumerate(panels):
        left, top = number % columns * width, 40 + number // columns * height
        box = left + 64, top + 24, left + width - 16, top + height - 48
        found = results[0]["tasks"][task]
        axes = charts.add_axes(figure, box, "memory factor", metric)
        axes.yaxis.set_label_coords((left + 14 - box[0]) / (box[2] - box[0]), 0.5)
        axes.set_title(task, size=13, color=charts.INK, loc="left")
        axes.set_xscale("log", base=2)
        ticks = sorted({round(result["memory_factor"], 2) for result in results})
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        if metric in SHARES and found["chance"] is not None:
            axes.axhline(found["chance"], color=charts.SOFT, linewidth=1, linestyle="dashed")
        for place, (name, dtype) in enumerate(names):
            line = [results[0], *(result for result in results[1:] if _line(result) == (name, dtype))]
            line.sort(key=lambda result: result["memory_factor"])
            values = [result["tasks"][task]["metrics"][metric] for result in line]
            errors = [1.96 * (value["standard_error"] or 0.0) for value in values]
            colour = charts.SERIES[named.index(name) if name in named else -1]
            beside = 1.04 ** (place - (len(names) - 1) / 2)  # of the others, which would hide its bars
            factors = [result["memory_factor"] * beside for result in line]
            style = LINES[[each for of, each in names if of == name].index(dtype) % len(LINES)]
            label = name if dtype is None else f"{name}, {dtype}"
            means = [value["value"] for value in values]
            axes.errorbar(factors, means, errors, color=colour, linewidth=2, linestyle=style, label=label)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=len(labels) or 1, frameon=False)
    charts.png(figure, path)
