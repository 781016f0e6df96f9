"""The charts of the page: points of every seed with their mean and interval, and lines."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from launch import charts
from launch.report import series
from launch.study.statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LEFT, RIGHT, ROW = 720, 250, 24, 34  # pixels
_LINES_HEIGHT, _LINES_LEFT = 320, 68
_MOST_POINTS = 200  # of a line

Line = tuple[str, Sequence[float], Sequence[float]]  # its name, x and y


def points(rows: Sequence[tuple[str, Summary]], x: str, label: str, *, factors: bool = False) -> str:
    """A row for each summary: a dot for each value, a stroke at the mean, and a line over the 95% interval.

    Args:
      rows: names and values; at least one.
      x: what the values are, with their unit.
      label: the figure in words.
      factors: whether values are factors, on a logarithmic axis, instead of differences, with zero in sight.
    """
    height = len(rows) * ROW
    figure = charts.new_figure(WIDTH, height + 60)
    axes = charts.add_axes(figure, (LEFT, 8, WIDTH - RIGHT, 8 + height), x)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=charts.LINE, linewidth=1, clip_on=False)
    ends = [end for _, of in rows for end in (*of.values, of.low, of.high) if math.isfinite(end)]
    if factors:
        ends = [end for end in ends if end > 0] + [1.0]
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(ends) / 1.15, max(ends) * 1.15)
        powers = range(math.floor(math.log2(min(ends))), math.floor(math.log2(max(ends) * 1.15)) + 1)
        axes.set_xticks([2.0**n for n in powers], [f"{2.0**n:g}x" for n in powers])
        axes.minorticks_off()
    else:
        low, high = min(0, *ends), max(0, *ends)
        margin = 0.06 * (high - low or 1)
        axes.set_xlim(low - margin, high + margin)
        axes.axvline(0, color=charts.SOFT, linewidth=1.5, clip_on=False)
        axes.locator_params(axis="x", nbins=6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    for place, (name, of) in enumerate(rows):
        _row(axes, place, name, of, factors)
    return charts.svg(figure, label)


def _row(axes: "Axes", place: int, name: str, of: Summary, factors: bool) -> None:
    colour = series.colour(place)
    if math.isfinite(of.low):
        low = max(of.low, axes.get_xlim()[0]) if factors else of.low
        axes.plot([low, of.high], [place, place], color=colour, linewidth=2, clip_on=False)
        axes.plot([of.mean, of.mean], [place - 0.3, place + 0.3], color=colour, linewidth=3, clip_on=False)
    for value in of.values:
        charts.add_dot(axes, value, place, 8, colour, title=f"{name}: {value:.4g}")


def lines(
    several: Sequence[Line],
    axes_say: tuple[str, str],
    label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    dots: bool = False,
) -> str:
    """Lines over one another, told apart as everywhere in reports, and named in a legend of their own; those of one
    name, such as one of each seed, look the same.

    Args:
      several: names, x and y.
      axes_say: what x and y are, with units.
      label: the figure in words.
      log_x, log_y: logarithmic axes, to the base of 2.
      zero: whether y = 0 is in sight.
      dots: whether each point has a dot, too.
    """
    figure = charts.new_figure(WIDTH, _LINES_HEIGHT)
    names = list(dict.fromkeys(name for name, _, _ in several))
    top = 20 + 18 * math.ceil(len(names) / 3)
    axes = charts.add_axes(figure, (_LINES_LEFT, top, WIDTH - RIGHT, _LINES_HEIGHT - 46), *axes_say)
    for place, (name, x, y) in enumerate(several):
        number, is_first = names.index(name), name not in {other for other, _, _ in several[:place]}
        shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).astype(int))
        xs, ys = [float(x[i]) for i in shown], [float(y[i]) for i in shown]
        colour, style = series.colour(number), series.dashes(number)
        axes.plot(
            xs, ys, color=colour, linestyle=style, linewidth=2, clip_on=False, label=name if is_first else "_"
        )  # what begins so is in no legend
        for at, value in zip(xs, ys, strict=True) if dots else ():
            charts.add_dot(axes, at, value, 6, colour, title=f"{name}: {value:.4g} at {at:g}")
    everything_x = [float(v) for _, x, _ in several for v in x]
    if log_x:
        axes.set_xscale("log", base=2)
        powers = range(math.ceil(math.log2(min(everything_x))), math.floor(math.log2(max(everything_x))) + 1)
        axes.set_xticks([2.0**n for n in powers], [f"{2.0**n:g}" for n in powers])
    if log_y:
        axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xlim(min(everything_x), max(everything_x) if max(everything_x) > min(everything_x) else None)
    if zero:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0), max(high, 0))
        axes.axhline(0, color=charts.SOFT, linewidth=1, clip_on=False)
    legend = figure.legend(loc="upper left", ncols=3, frameon=False, fontsize=12)
    for text in legend.get_texts():
        text.set_color(charts.INK)
    return charts.svg(figure, label)
