"""Curves, and how they are drawn: against steps, tokens and hours, of which the page shows what its reader chose."""

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from launch import charts
from launch.report import series
from launch.report.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "steps": "training step",
    "tokens": "tokens trained on",
    "hours": "hours since the first start, pauses too",
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 68, 16, 12, 44  # of a chart, pixels
MAX_POINTS, MIN_POINTS, ALL_POINTS = 600, 120, 2_400  # of a line, and of all lines of a chart
MIN_DOTS, ALL_DOTS = 8, 180  # validations of a line, and of all lines of a chart
MAX_RAW = 4  # runs whose losses are shown step by step
BEGINNING = 0.05  # of a chart: higher losses there are cut off


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of a scalar, finite, in the order of their steps; all arrays are [points]."""

    steps: np.ndarray
    tokens: np.ndarray
    hours: np.ndarray  # since the run was first started
    values: np.ndarray

    @classmethod
    def of(cls, run: Run, name: str) -> "Curve":
        """A scalar of a run; no points if it was never written."""
        points = run.series(name)
        steps, values = np.array(points.steps, np.int64), np.array(points.values)
        # A clock that was set back: no point is before the one before.
        hours = np.maximum.accumulate((np.array(points.times) - run.began) / 3600) if len(steps) else values
        return cls(steps, steps * (run.tokens_per_step or 1), hours, values).take(np.isfinite(values))

    def take(self, which: np.ndarray) -> "Curve":
        """Some of the points, by indices or a mask."""
        return Curve(self.steps[which], self.tokens[which], self.hours[which], self.values[which])

    def smoothed(self) -> "Curve":
        """The mean over a 25th of the points (at least 3) around each: narrower at the beginning, where losses fall,
        and one-sided at the end.
        """
        half, count = max(1, len(self.steps) // 50), len(self.values)
        sums = np.concatenate([[0.0], np.cumsum(self.values, dtype=np.float64)])
        centre = np.arange(count)
        before = np.minimum(half, centre)
        end = np.minimum(centre + before + 1, count)
        means = (sums[end] - sums[centre - before]) / (end - centre + before)
        return dataclasses.replace(self, values=means)

    def thinned(self, most: int = MAX_POINTS) -> "Curve":
        """At most about `most` points, evenly picked, the last one included."""
        stride = max(1, len(self.steps) // most)
        return self.take(np.arange((len(self.steps) - 1) % stride, len(self.steps), stride))

    def minus(self, other: "Curve") -> "Curve":
        """The difference where both have seen as many tokens."""
        _, mine, theirs = np.intersect1d(self.tokens, other.tokens, return_indices=True)
        return dataclasses.replace(self.take(mine), values=self.values[mine] - other.values[theirs])

    def near(self, step: int) -> "Curve":
        """The one point that is nearest to a step; none of none."""
        return self.take(np.abs(self.steps - step).argsort(kind="stable")[:1])


@dataclasses.dataclass(frozen=True)
class Line:
    """One run in a chart."""

    name: str
    number: int  # of the run on the page
    raw: Curve
    validation: Curve
    marks: Sequence[tuple[Curve, str, str]] = ()  # one point each, "restart" or "alarm", and what it says


def plots(lines: Sequence[Line], unit: str, title: str, zero: bool = False) -> str:
    """One chart for each of AXES; with `zero` in sight."""
    if not any(len(curve.steps) for line in lines for curve in (line.raw, line.validation)):
        return "<p class=note>No points were written.</p>"
    most = max(MIN_POINTS, min(MAX_POINTS, ALL_POINTS // len(lines)))
    dots = max(MIN_DOTS, ALL_DOTS // len(lines))
    smooth = [line.raw.smoothed().thinned(most) for line in lines]
    thin = [
        dataclasses.replace(line, raw=line.raw.thinned(most), validation=line.validation.thinned(dots))
        for line in lines
    ]
    limits = _limits(thin, smooth, zero)
    return "".join(_chart(thin, smooth, axis, limits, (unit, title)) for axis in AXES)


def _limits(lines: Sequence[Line], smooth: Sequence[Curve], zero: bool) -> tuple[float, float]:
    """Of the values: all lines from their highest after the beginning on down, and all validations."""
    last = max(curve.steps[-1] for line in lines for curve in (line.raw, line.validation) if len(curve.steps))
    shown = [0.0] if zero else []
    for line, curve in zip(lines, smooth, strict=True):
        shown += line.validation.values.tolist()
        if len(curve.steps):
            later = curve.values[np.searchsorted(curve.steps, min(BEGINNING * last, curve.steps[-1])) :]
            # What rises above where it stood after the beginning, as a run that diverges, is cut off too.
            shown += later.tolist() if zero else later[later <= later[0]].tolist()
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low or 1)
    return low - margin, high + margin


def _chart(
    lines: Sequence[Line],
    smooth: Sequence[Curve],
    axis: str,
    limits: tuple[float, float],
    words: tuple[str, str],
) -> str:
    """`smooth` are the lines' means, `words` the unit of the values and the title."""
    low, high = limits
    everything = [curve for line in lines for curve in (line.raw, line.validation) if len(curve.steps)]
    last = max(float(getattr(curve, axis)[-1]) for curve in everything) or 1.0
    figure = charts.new_figure(WIDTH, HEIGHT)
    axes = charts.add_axes(figure, (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), AXES[axis], words[0])
    axes.set(xlim=(0, last), ylim=limits)
    if last >= 1_000_000:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e9:g}B" if last >= 4e9 else f"{x / 1e6:g}M")
    elif axis != "hours":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=7, **({} if axis == "hours" else {"integer": True}))
    axes.locator_params(axis="y", nbins=6)
    if low < 0 < high:
        axes.axhline(0, color=charts.SOFT, linewidth=1, clip_on=False)
    stroke = (high - low) * 14 / (HEIGHT - TOP - BOTTOM)  # half of its length, in units of the values
    for line, curve in zip(lines, smooth, strict=True):
        colour = series.colour(line.number)
        if len(lines) <= MAX_RAW:
            x, values = getattr(line.raw, axis), _inside(line.raw, limits)
            axes.plot(x, values, linewidth=1, alpha=0.3, gid=charts.gid("raw"), color=colour, clip_on=False)
        x, values, style = getattr(curve, axis), _inside(curve, limits), series.dashes(line.number)
        axes.plot(x, values, linewidth=2, linestyle=style, gid=charts.gid("line"), color=colour, clip_on=False)
        for i, value in enumerate(line.validation.values):
            says = f"{line.name}, step {line.validation.steps[i]:,}: validation {value:.4f}"
            x, y = float(getattr(line.validation, axis)[i]), min(max(value, low), high)
            charts.add_dot(axes, x, y, 7 if len(lines) <= MAX_RAW else 5, colour, css="mark", title=says)
        for point, kind, says in line.marks:
            x, y = float(getattr(point, axis)[0]), min(max(float(point.values[0]), low + stroke), high - stroke)
            gid = charts.gid(kind, says)
            if kind == "alarm":
                axes.text(x, y + stroke, "▲", size=11, color=charts.INK, ha="center", va="center", gid=gid)
            else:
                axes.plot([x, x], [y - stroke, y + stroke], linewidth=3, gid=gid, color=colour, clip_on=False)
    return _framed(figure, lines, smooth, axis, (last, words[1]))


def _inside(curve: Curve, limits: tuple[float, float]) -> np.ndarray:
    """Its values; none where they are above the limits, so that the line ends there."""
    return np.where(curve.values <= limits[1], np.maximum(curve.values, limits[0]), np.nan)


def _framed(
    figure: "Figure", lines: Sequence[Line], smooth: Sequence[Curve], axis: str, about: tuple[float, str]
) -> str:
    """The chart with what its read-out needs."""
    last, title = about
    digits = {"steps": 0, "tokens": 0, "hours": 4}[axis]
    readout = {
        "last": last,
        "axis": axis,
        "series": [
            {
                "name": line.name,
                "x": [round(float(x), digits) if digits else int(x) for x in getattr(curve, axis)],
                "values": [round(float(value), 4) for value in curve.values],
            }
            for line, curve in zip(lines, smooth, strict=True)
        ],
    }
    data = f"data-plot='{escape(json.dumps(readout, separators=(',', ':')))}' data-left={LEFT}"
    pointer = f"<line class=cursor y1={TOP} y2={HEIGHT - BOTTOM} x1=-9 x2=-9 />"
    chart = charts.svg(figure, f"{title} against {axis}", "chart", f"{data} data-width={WIDTH - LEFT - RIGHT}", pointer)
    return f"<div class='by {axis}'><div class=scroll>{chart}</div><p class='note readout'>&nbsp;</p></div>"
