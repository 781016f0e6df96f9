"""How much each layer masks as a run goes on: a map of layers by evaluations."""

import itertools
import re
from collections.abc import Sequence
from html import escape

import numpy as np

from launch.report import series
from launch.report.run import Run

STATISTICS = {  # what they say, and the lower bounds of their shades
    "forgotten_fraction": ("share of the context that is masked", (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)),
    "mean_f": ("mean F, nats", (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)),
}
ALL_CELLS = 12_000  # of a page
CELL_WIDTH, CELL_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 14, 20, 44, 4, 30  # of a map, pixels; CELL_WIDTH of all
OPEN = 4  # runs whose maps are shown at once


def layers(run: Run, statistic: str) -> tuple[list[int], np.ndarray]:
    """A statistic of the selection: (steps [S], values [L, S]), both empty where it was not written."""
    pattern = re.compile(rf"selection_{statistic}/layer_\d+")
    found = [run.series(name) for name in sorted(filter(pattern.fullmatch, run.metrics.scalars))]
    steps = found[0].steps if found else []
    values = [points.values for points in found if points.steps == steps]
    return (steps, np.array(values)) if steps else ([], np.zeros((0, 0)))


def selection_section(runs: Sequence[Run]) -> str:
    """Empty if no run selects."""
    selecting = [(i, run) for i, run in enumerate(runs) if layers(run, "mean_f")[0]]
    if not selecting:
        return ""
    most_cells = ALL_CELLS // (len(selecting) * len(STATISTICS))
    parts = []
    for place, (number, run) in enumerate(selecting):
        maps = "".join(_map(run, statistic, most_cells) for statistic in STATISTICS)
        head = f"<summary><h3>{series.key(number)}{escape(run.name)}</h3></summary>"
        parts.append(f"<details {'open' if place < OPEN else ''}>{head}<div class=pair>{maps}</div></details>")
    return (
        f"<section><h2>What is masked, by layer</h2>{''.join(parts)}<p class=note>Layers from the bottom up, "
        "evaluations from left to right; at the right edge the last value. A masked token is one whose F exceeds the "
        "tau of the memory loss.</p></section>"
    )


def _map(run: Run, statistic: str, most_cells: int) -> str:
    steps, values_LS = layers(run, statistic)
    title, bounds = STATISTICS[statistic]
    if not steps:
        return ""
    columns = max(8, min(len(steps), most_cells // len(values_LS)))
    shown = np.unique(np.linspace(0, len(steps) - 1, columns).round().astype(int))
    width, height = CELL_WIDTH / len(shown), len(values_LS) * CELL_HEIGHT
    cells: list[list[str]] = [[] for _ in bounds]
    for layer, column in itertools.product(range(len(values_LS)), range(len(shown))):
        band = sum(values_LS[layer, shown[column]] >= bound for bound in bounds) - 1
        if band >= 0:
            x, y = LEFT + column * width, TOP + height - (layer + 1) * CELL_HEIGHT
            cells[band].append(f"M{x:.1f} {y}h{width - 0.6:.1f}v{CELL_HEIGHT - 1}h{0.6 - width:.1f}z")
    parts = [f"<path class=field d='M{LEFT} {TOP}h{CELL_WIDTH}v{height}h-{CELL_WIDTH}z' />"]
    parts += [f"<path class=f{band + 1} d='{''.join(path)}' />" for band, path in enumerate(cells) if path]
    every = -(-len(values_LS) // 12)
    for layer, last in enumerate(values_LS[:, -1]):
        y = TOP + height - layer * CELL_HEIGHT - 3
        if layer % every == 0:
            parts.append(f"<text x={LEFT - 4} y={y} text-anchor=end>{layer}</text>")
            parts.append(f"<text x={LEFT + CELL_WIDTH + 4} y={y}>{last:.2f}</text>")
    below = TOP + height + 14
    parts.append(f"<text x={LEFT} y={below}>step {steps[0]:,}</text>")
    if len(steps) > 1:
        parts.append(f"<text x={LEFT + CELL_WIDTH} y={below} text-anchor=end>{steps[-1]:,}</text>")
    box = f"0 0 {LEFT + CELL_WIDTH + RIGHT} {TOP + height + BOTTOM - 12}"
    ends = [*(f"{a:g} to {b:g}" for a, b in itertools.pairwise(bounds)), f"over {bounds[-1]:g}"]
    keys = "".join(f"<span><span class='key f{i + 1}'></span>{end}</span>" for i, end in enumerate(ends))
    return (
        f"<figure><figcaption>{title}</figcaption><svg class=layers viewBox='{box}' role=img "
        f"aria-label='{title}, by layer and step'>{''.join(parts)}</svg><p class=legend>{keys}</p></figure>"
    )
