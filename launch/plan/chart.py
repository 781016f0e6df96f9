"""A picture of how speed scales: tokens/s and MFU against chips, weak and strong."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch import charts

SIZE = (1200, 560)  # pixels
BOXES = ((90, 70, 570, 450), (690, 70, 1170, 450))  # of the two panels
COLOURS = {"weak": "#0b6e99", "strong": "#c2571a"}
TITLES = {"weak": "weak: batch grows with the chips", "strong": "strong: the same batch"}
IDEAL = "#b5b5b5"


def slice_names(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The slices of each number of chips, as the table names them."""
    names: dict[int, list[str]] = {}
    for row in rows:
        names.setdefault(row["chips"], []).append(row["topology"])
    return {chips: ", ".join(dict.fromkeys(of)) for chips, of in names.items()}


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draws the rows of `scaling.scale` that fit into a PNG at `path`."""
    rows = [row for row in rows if "error" not in row]
    figure = charts.new_figure(*SIZE, background="white")
    if rows:
        from matplotlib.ticker import EngFormatter, LogLocator, PercentFormatter

        names = slice_names(rows)
        speed, mfu = (charts.add_axes(figure, box, x="slice, chips") for box in BOXES)
        chips, first = sorted(names), rows[0]
        ideal = [first["tokens_per_second"] * n / first["chips"] for n in chips]
        # Wider than a series: under one that it coincides with, it shows.
        label = "ideal: tokens/s in proportion to chips"
        speed.plot(chips, ideal, color=IDEAL, linewidth=10, dashes=(0.7, 0.7), dash_capstyle="butt", label=label)
        for axes, key in ((speed, "tokens_per_second"), (mfu, "mfu")):
            for kind, colour in COLOURS.items():
                points = sorted((row["chips"], row[key]) for row in rows if row["scaling"] == kind)
                axes.plot(
                    [n for n, _ in points], [value for _, value in points], "o-", color=colour, linewidth=3,
                    markersize=10, label=TITLES[kind], clip_on=False,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xticks(chips, [f"{names[n]}\n{n:,}" for n in chips], minor=False)
            axes.set_xticks([], minor=True)
        speed.set_yscale("log")
        speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        speed.yaxis.set_major_formatter(EngFormatter())
        speed.set_title("tokens/s, estimated", loc="left", size=17, pad=18)
        mfu.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        mfu.set_ylim(bottom=0, top=1.1 * max(row["mfu"] for row in rows))
        mfu.set_title("MFU, estimated", loc="left", size=17, pad=18)
        figure.legend(*speed.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=14)
    charts.png(figure, path)
