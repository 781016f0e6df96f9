"""A picture of how speed scales: tokens/s and MFU against chips, weak and strong."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZE = (1200, 560)  # pixels
FINER = 3  # drawn this much larger, then reduced: Pillow draws no smooth lines
COLOURS = {"weak": "#0b6e99", "strong": "#c2571a"}
TITLES = {"weak": "weak: batch grows with the chips", "strong": "strong: the same batch"}
INK, GREY, LIGHT, IDEAL = "#222222", "#777777", "#dddddd", "#b5b5b5"
Point = tuple[float, float]


class Panel:
    """Axes in a part of the picture; chips on a logarithmic scale from left to right."""

    def __init__(self, image: Image.Image, box: tuple[int, int, int, int], names: dict[int, str]) -> None:
        """`names`: of the slices, by their chips."""
        self.draw = ImageDraw.Draw(image)
        self.left, self.top, self.right, self.bottom = (FINER * edge for edge in box)
        self.names, self.chips = names, sorted(names)
        self.low = self.high = 0.0
        self.scale: Callable[[float], float] = float

    def axes(self, title: str, ticks: Sequence[tuple[float, str]], scale: Callable[[float], float]) -> None:
        """Title, frame, and lines at `ticks` (value, label), whose ends are the panel's."""
        self.scale, self.low, self.high = scale, scale(ticks[0][0]), scale(ticks[-1][0])
        self.text((self.left, self.top - 34 * FINER), title, 17, anchor="la")
        for value, label in ticks:
            y = self.at(self.chips[0], value)[1]
            self.draw.line((self.left, y, self.right, y), LIGHT, FINER)
            self.text((self.left - 8 * FINER, y), label, 13, GREY, "rm")
        for chips in self.chips:
            x = self.at(chips, ticks[0][0])[0]
            self.draw.line((x, self.bottom, x, self.bottom + 5 * FINER), GREY, FINER)
            self.text((x, self.bottom + 9 * FINER), self.names[chips], 13, INK, "ma")
            self.text((x, self.bottom + 27 * FINER), f"{chips:,}", 13, GREY, "ma")
        self.text((self.left - 36 * FINER, self.bottom + 27 * FINER), "chips", 13, GREY, "ra")

    def at(self, chips: float, value: float) -> Point:
        first, last = math.log2(self.chips[0]), math.log2(self.chips[-1])
        along = (math.log2(chips) - first) / max(last - first, 1e-9)
        up = (self.scale(value) - self.low) / (self.high - self.low)
        return self.left + along * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def series(self, points: Sequence[Point], colour: str) -> None:
        """A line with a dot at each (chips, value); nothing where none fits."""
        places = [self.at(*point) for point in points]
        if len(places) > 1:
            self.draw.line(places, colour, 3 * FINER, joint="curve")
        for x, y in places:
            r = 5 * FINER
            self.draw.ellipse((x - r, y - r, x + r, y + r), colour)

    def text(self, place: Point, text: str, size: int, colour: str = INK, anchor: str = "la") -> None:
        self.draw.text(place, text, colour, ImageFont.load_default(size * FINER), anchor)


def dashed(draw: ImageDraw.ImageDraw, start: Point, end: Point) -> None:
    """A broken line in IDEAL, wider than a series: under one that it coincides with, it shows."""
    length, dash = math.dist(start, end), 7 * FINER
    for n in range(0, int(length / dash), 2):
        ends = [tuple(a + (b - a) * m * dash / length for a, b in zip(start, end, strict=True)) for m in (n, n + 1)]
        draw.line(ends, IDEAL, 10 * FINER)


def slice_names(rows: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The slices of each number of chips, as the table names them."""
    names: dict[int, list[str]] = {}
    for row in rows:
        names.setdefault(row["chips"], []).append(row["topology"])
    return {chips: ", ".join(dict.fromkeys(of)) for chips, of in names.items()}


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws the rows of `scaling.scale` that fit into a PNG at `path`."""
    rows = [row for row in rows if "error" not in row]
    image = Image.new("RGB", (SIZE[0] * FINER, SIZE[1] * FINER), "white")
    if rows:
        names = slice_names(rows)
        speed = Panel(image, (90, 70, 570, 450), names)
        dashed(speed.draw, *_speed_axes(speed, rows))
        mfu = Panel(image, (690, 70, 1170, 450), names)
        top = math.ceil(10 * max(row["mfu"] for row in rows)) * 10
        mfu.axes("MFU, estimated", [(n / 100, f"{n} %") for n in range(0, top + 1, 10)], float)
        for kind, colour in COLOURS.items():
            for panel, key in ((speed, "tokens_per_second"), (mfu, "mfu")):
                points = [(row["chips"], row[key]) for row in rows if row["scaling"] == kind]
                panel.series(points, colour)
            x = {"weak": 90, "strong": 430}[kind] * FINER
            speed.draw.line((x, 528 * FINER, x + 30 * FINER, 528 * FINER), colour, 3 * FINER)
            speed.text((x + 38 * FINER, 528 * FINER), TITLES[kind], 14, INK, "lm")
        dashed(speed.draw, (690 * FINER, 528 * FINER), (720 * FINER, 528 * FINER))
        speed.text((728 * FINER, 528 * FINER), "ideal: tokens/s in proportion to chips", 14, INK, "lm")
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path, "PNG")


def _speed_axes(panel: Panel, rows: Sequence[dict[str, Any]]) -> tuple[Point, Point]:
    """Tokens/s on a logarithmic scale; where on the picture the line of perfect scaling starts and ends."""
    first = rows[0]
    start, end = ((n, first["tokens_per_second"] * n / first["chips"]) for n in (panel.chips[0], panel.chips[-1]))
    values = [*(row["tokens_per_second"] for row in rows), start[1], end[1]]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [(10.0**n, _thousands(10**n)) for n in range(low, max(high, low + 1) + 1)]
    panel.axes("tokens/s, estimated", ticks, math.log10)
    return panel.at(*start), panel.at(*end)


def _thousands(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number // size} {unit}"
    return str(number)
