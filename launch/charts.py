"""Charts, drawn by matplotlib: as SVG inside a page, light or dark as its reader's system is, and as PNG.

Every length here is in pixels: a figure has 72 of them to the inch, so that matplotlib's points are pixels too.
matplotlib is imported where something is drawn, since that takes a second.
"""

import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1b1b1a", "#63625d", "#e3e2dd"  # text, labels, grid
# The first six differ clearly for those too who see no red, no green or no blue; light and dark.
SERIES = ("#1b61c6", "#b23d14", "#0aa183", "#490d7b", "#d47d00", "#ef005c", "#0f8ea3", "#7a7974")
_LIGHT = {"back": "#fcfcfb", "ink": INK, "soft": SOFT, "line": LINE} | {f"s{i}": c for i, c in enumerate(SERIES)}
_DARK = {
    "back": "#171716", "ink": "#efeeea", "soft": "#a3a29b", "line": "#33322f",
    "s0": "#0088f1", "s1": "#cb5f40", "s2": "#5aedad", "s3": "#925d85", "s4": "#b4ca20", "s5": "#fdadf0",
    "s6": "#35b8cf", "s7": "#a09f99",
}  # fmt: skip
_DPI = 72


def palette() -> str:
    """CSS that a page with charts needs: its colours as variables, `--ink`, `--s0` and so on, for light and dark."""
    light, dark = ("".join(f"--{name}: {value}; " for name, value in theme.items()) for theme in (_LIGHT, _DARK))
    return f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"


def new_figure(width: float, height: float, background: str = "none") -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=background)


def add_axes(figure: "Figure", box: tuple[float, float, float, float], x: str = "", y: str = "") -> "Axes":
    """Axes without a frame, and lines across them.

    Args:
      figure: of `new_figure`.
      box: the left, top, right and bottom edges, from the figure's upper left corner.
      x, y: what the axes say, with units.
    """
    width, height = figure.get_size_inches() * _DPI
    left, top, right, bottom = box
    axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", bottom=False, left=False, labelcolor=SOFT, labelsize=12)
    axes.grid(axis="y", color=LINE, linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=SOFT, size=12)
    axes.set_ylabel(y, color=SOFT, size=12)
    axes.yaxis.set_label_coords((14 - left) / (right - left), 0.5)  # at the edge, clear of the ticks
    return axes


def add_dot(axes: "Axes", x: float, y: float, size: float, colour: str, *, css: str = "", title: str = "") -> None:
    """A dot, with classes and a text under the pointer: a line without length, whose round ends make it."""
    ends = [x, x], [y, y]
    axes.plot(*ends, color=colour, linewidth=size, solid_capstyle="round", clip_on=False, gid=gid(css, title))


def gid(css: str, title: str = "") -> str:
    """A `gid` for an artist, which in `svg` gets these classes, and a text that appears under the pointer."""
    return f"css:{css}|{title}"


def svg(figure: "Figure", label: str, css: str = "", attributes: str = "", more: str = "") -> str:
    """The figure as an SVG element in the variables of `palette`. The same figure always gives the same text.

    It refers to nothing by id or address as long as no artist is clipped and none has markers.

    Args:
      figure: of `new_figure`.
      label: what it shows, for those who cannot see it.
      css, attributes, more: classes, further attributes and further content of the element.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "charts", "path.simplify": False}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    text = text[text.index('<g id="figure_1">') : text.rindex("</svg>")]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="css:([^|"]*)\|([^"]*)">', r"<g class='\1'><title>\2</title>", text)
    text = text.replace("<title></title>", "")
    text = re.sub(r' id="[^"]*"| transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"font-family: [^;]*;", "font-family: system-ui, sans-serif;", text)
    for name, colour in _LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), text)  # to a tenth of a pixel
    width, height = figure.get_size_inches() * _DPI
    return (
        f"<svg class='{css}' viewBox='0 0 {width:g} {height:g}' role=img aria-label='{escape(label)}' {attributes} "
        f"style='stroke-linejoin: round'>{text}{more}</svg>"
    )


def png(figure: "Figure", path: str | Path) -> None:
    """Writes the figure, at a pixel for a pixel."""
    figure.savefig(path, format="png")
