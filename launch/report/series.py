"""How the runs of a page are told apart: six colours, then the same in dashes, then in dots."""

from collections.abc import Sequence
from html import escape

from launch import charts

_COLOURS = 6  # of `charts.SERIES`, which the colour-blind tell apart
_STYLES = (("solid", "-"), ("dashed", (0, (4, 2))), ("dotted", (0, (1, 1.5))))  # in CSS, and for matplotlib


def colour(number: int) -> str:
    """Of run number 0, 1, ... on the page."""
    return charts.SERIES[number % _COLOURS]


def dashes(number: int) -> str | tuple[int, tuple[float, ...]]:
    """matplotlib's line style of a run."""
    return _STYLES[number // _COLOURS % len(_STYLES)][1]  # type: ignore[return-value]


def key(number: int) -> str:
    """A piece of a run's line, as HTML."""
    css = _STYLES[number // _COLOURS % len(_STYLES)][0]
    return f"<i class=run style='border-top-style:{css};border-color:var(--s{number % _COLOURS})'></i>"


def legend(names: Sequence[str]) -> str:
    """The lines of all runs with their names, which are escaped."""
    return f"<p class=legend>{''.join(f'<span>{key(i)}{escape(name)}</span>' for i, name in enumerate(names))}</p>"
