"""The page of `launch.report`: HTML with inline SVG that stands alone, light or dark as the reader's system is.

Curves are drawn by `launch.charts`. The masks, which are text as much as pictures, are made here: cells that the page's
styles colour, and that its script finds by their place; it only adds read-outs under the pointer. All text that comes
from documents or the command line goes through `escape`.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from data.tokenizer import legible
from launch import charts

FORGOTTEN = 1.0  # F above which a token counts as forgotten, as tau in the paper's memory loss
F_BANDS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # lower bounds; one shade each
LAG_BANDS = (1, 4, 8, 16, 32)  # tokens until forgotten, lower bounds; the sooner, the stronger the shade
CELL, LABEL, MAX_LABEL = 13, 84, 10  # of the heat map: pixels, pixels, characters
PLOT_WIDTH, PLOT_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 300, 68, 16, 12, 44  # of a line chart, pixels
MAX_POINTS = 600  # of a line


@dataclasses.dataclass(frozen=True)
class Curve:
    """A scalar over steps, ascending."""

    steps: list[int]
    values: list[float]

    @classmethod
    def joined(cls, first: "Curve", second: "Curve") -> "Curve":
        """Both; where they share a step, the second's value."""
        points = dict(zip(first.steps + second.steps, first.values + second.values, strict=True))
        return cls(sorted(points), [points[step] for step in sorted(points)])

    def smoothed(self) -> "Curve":
        """The centred mean over a 25th of the steps (at least 3), narrower towards the ends."""
        half = max(1, len(self.steps) // 50)
        sums = np.concatenate([[0.0], np.cumsum(self.values, dtype=np.float64)])
        centre = np.arange(len(self.values))
        reach = np.minimum(half, np.minimum(centre, len(self.values) - 1 - centre))
        means = (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)
        return Curve(self.steps, means.tolist())

    def thinned(self) -> "Curve":
        """At most about MAX_POINTS points, evenly picked, the last one included."""
        stride = max(1, len(self.steps) // MAX_POINTS)
        keep = range((len(self.steps) - 1) % stride, len(self.steps), stride)
        return Curve([self.steps[i] for i in keep], [self.values[i] for i in keep])

    def minus(self, other: "Curve") -> "Curve":
        """The difference at the steps that both have."""
        theirs = dict(zip(other.steps, other.values, strict=True))
        points = [(s, v - theirs[s]) for s, v in zip(self.steps, self.values, strict=True) if s in theirs]
        return Curve([step for step, _ in points], [value for _, value in points])


@dataclasses.dataclass(frozen=True)
class SentenceMasks:
    """F of every layer over one sentence."""

    pieces: list[str]  # of the tokenizer, BOS first
    masks: np.ndarray  # float32 [L, N, N], rows are queries

    def forgotten_at(self, layer: int) -> list[int | None]:
        """For each token the first query whose F on it exceeds FORGOTTEN, None if there is none."""
        over_NN = self.masks[layer] > FORGOTTEN
        return [int(column.argmax()) if column.any() else None for column in over_NN.T]


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What the page says of one run."""

    name: str
    selective: bool
    parameters: int
    num_layers: int
    steps: int
    train_tokens: int
    loss: float  # validation, nats per token
    perplexity: float  # validation
    validation_tokens: int
    train_curve: Curve  # nats per token
    eval_curve: Curve
    prompt: str
    continuation: str
    masks: SentenceMasks | None


def render(reports: Sequence[RunReport]) -> str:
    """The whole page."""
    sections = [_result_section(reports), _curves_section(reports), _samples_section(reports)]
    sections += [_masks_section(report.name, report.masks) for report in reports if report.masks is not None]
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    return template.replace("@PALETTE@", charts.palette()).replace("@SECTIONS@", "\n".join(sections))


def _result_section(reports: Sequence[RunReport]) -> str:
    best = min(report.perplexity for report in reports)
    rows = "".join(
        f"<tr><th scope=row><span class='key s{i % 4}'></span>{escape(r.name)}</th>"
        f"<td class='big{' best' if r.perplexity == best else ''}'>{r.perplexity:.2f}</td><td>{r.loss:.4f}</td>"
        f"<td>{r.parameters:,}</td><td>{r.num_layers}</td><td>{r.steps:,}</td><td>{r.train_tokens:,}</td></tr>"
        for i, r in enumerate(reports)
    )
    headings = (
        "run",
        "validation perplexity",
        "loss, nats per token",
        "parameters",
        "layers",
        "steps",
        "tokens trained on",
    )
    return (
        "<section><h2>Result</h2><div class=scroll><table><thead><tr>"
        + "".join(f"<th scope=col>{heading}</th>" for heading in headings)
        + f"</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class=note>Perplexity over the whole validation split, {reports[0].validation_tokens:,} tokens; lower is "
        "better. It is e to the power of the loss.</p></section>"
    )


def _curves_section(reports: Sequence[RunReport]) -> str:
    lines, marks = [], []
    for i, r in enumerate(reports):
        lines += [(r.train_curve, i % 4, None), (r.train_curve.smoothed(), i % 4, r.name)]
        marks.append((r.eval_curve, i % 4, r.name))
    text = (
        _legend(reports)
        + _chart(lines, marks, "loss, nats per token", "Loss over training steps")
        + "<p class=note>Faint: the training loss of each step. Lines: its centred mean over a 25th of the run. "
        "Dots: the validation loss (at the last step over the whole split). Lower is better.</p>"
    )
    pair = {report.selective: report for report in reports}
    if len(reports) == 2 and len(pair) == 2:
        gain = pair[False].train_curve.minus(pair[True].train_curve)
        marks = [(pair[False].eval_curve.minus(pair[True].eval_curve), 2, "difference")]
        if gain.steps:
            names = f"loss of {escape(pair[False].name)} minus that of {escape(pair[True].name)}"
            text += (
                f"<h3>What selection gains: {names}</h3>"
                + _chart(
                    [(gain, 2, None), (gain.smoothed(), 2, "training")],
                    marks,
                    "difference, nats per token",
                    "Difference of the losses over training steps",
                    zero=True,
                )
                + "<p class=note>Above zero the selective model is better. If both runs saw the same batches, as those "
                "of one dataset and seed do, the noise that they share cancels out. Line, faint line and dots as "
                "above.</p>"
            )
    return f"<section><h2>Loss curves</h2>{text}</section>"


def _legend(reports: Sequence[RunReport]) -> str:
    return (
        "<p class=legend>"
        + "".join(f"<span><span class='key s{i % 4}'></span>{escape(r.name)}</span>" for i, r in enumerate(reports))
        + "</p>"
    )


def _chart(
    lines: Sequence[tuple[Curve, int, str | None]],
    marks: Sequence[tuple[Curve, int, str]],
    unit: str,
    title: str,
    zero: bool = False,
) -> str:
    """A line chart.

    Args:
      lines: (curve, series, name), drawn faint and unsmoothed where there is no name.
      marks: (curve, series, name), drawn as dots.
      unit, title: of the values, and of the chart.
      zero: keep zero in sight, and clip what is faint.
    """
    curves = [curve for curve, _, _ in [*lines, *marks] if curve.steps]
    if not curves:
        return "<p class=note>No points were logged.</p>"
    last = max(curve.steps[-1] for curve in curves)
    shown = [v for curve, _, name in [*lines, *marks] if name or not zero for v in curve.values]
    low, high = min([*shown, 0.0] if zero else shown), max([*shown, 0.0] if zero else shown)
    margin = 0.06 * (high - low or 1)
    low, high = low - margin, high + margin
    figure = charts.new_figure(PLOT_WIDTH, PLOT_HEIGHT)
    axes = charts.add_axes(figure, (LEFT, TOP, PLOT_WIDTH - RIGHT, PLOT_HEIGHT - BOTTOM), "training step", unit)
    axes.set(xlim=(0, last), ylim=(low, high))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=8, integer=True)
    axes.locator_params(axis="y", nbins=6)
    if zero:
        axes.axhline(0, color=charts.SOFT, linewidth=1, clip_on=False)
    for curve, series, name in lines:
        thin, (css, width, alpha) = curve.thinned(), ("line", 2, 1.0) if name else ("raw", 1, 0.3)
        values, colour, gid = np.clip(thin.values, low, high), charts.SERIES[series], charts.gid(css)
        axes.plot(thin.steps, values, color=colour, linewidth=width, alpha=alpha, gid=gid, clip_on=False)
    for curve, series, name in marks:
        for step, value in zip(curve.steps, curve.values, strict=True):
            says = f"{name}, step {step:,}: validation {value:.4f}"
            inside = min(max(value, low), high)
            charts.add_dot(axes, step, inside, 8, charts.SERIES[series], css="mark", title=says)
    named = [(curve.thinned(), name) for curve, _, name in lines if name]
    readout = {
        "last": last,
        "series": [{"name": n, "steps": c.steps, "values": [round(v, 4) for v in c.values]} for c, n in named],
    }
    width = PLOT_WIDTH - LEFT - RIGHT
    data = f"data-plot='{escape(json.dumps(readout))}' data-left={LEFT} data-width={width}"
    pointer = (
        f"<line class=cursor y1={TOP} y2={PLOT_HEIGHT - BOTTOM} x1=-9 x2=-9 />"
        f"<text class=readout x={PLOT_WIDTH - RIGHT} y={TOP + 12} text-anchor=end></text>"
    )
    return f"<div class=scroll>{charts.svg(figure, title, 'chart', data, pointer)}</div>"


def _samples_section(reports: Sequence[RunReport]) -> str:
    samples = "".join(
        f"<figure><figcaption><span class='key s{i % 4}'></span>{escape(r.name)}</figcaption>"
        f"<pre><span class=prompt>{escape(r.prompt)}</span>{escape(r.continuation)}</pre></figure>"
        for i, r in enumerate(reports)
    )
    return (
        f"<section><h2>Samples</h2><div class=pair>{samples}</div><p class=note>Faint: the prompt, the same for all, "
        "from the validation split. After it: what the model wrote.</p></section>"
    )


def _masks_section(name: str, masks: SentenceMasks) -> str:
    labels = [legible(piece) for piece in masks.pieces]
    layers = "".join(_layer(masks, labels, layer) for layer in range(len(masks.masks)))
    bounds = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(F_BANDS)] + [f"over {F_BANDS[-1]:g}"]
    f_keys = "".join(f"<span><span class='key f{i + 1}'></span>{bound}</span>" for i, bound in enumerate(bounds))
    lag_keys = "".join(
        f"<span><span class='key f{6 - i}'></span>{low}{f' to {high - 1}' if high else ' or more'}</span>"
        for i, (low, high) in enumerate(zip(LAG_BANDS, (*LAG_BANDS[1:], None), strict=True))
    )
    return f"""<section><h2>What “{escape(name)}” forgets</h2>
<p>A validation sentence of {len(labels) - 1} tokens: of those searched, the one with the clearest difference between
tokens that are kept and tokens that are forgotten. In every layer each token, as a query, may add to the mask F of
earlier tokens; later queries then weigh those tokens down by the factor e<sup>&minus;F</sup>. At F = {FORGOTTEN:g}
about a third of the weight is left: above it a token counts as forgotten here. <b>·</b> is a space, <b>↵</b> a line
break, <b>[E2]</b> a byte of a character that is no token, <b>[bos]</b> the beginning, which is never masked.</p>
<p class=legend><span><b>Token strip</b>, tokens until forgotten:</span>{lag_keys}
<span><span class='key kept'></span>kept</span></p>
<p class=legend><span><b>Heat map</b>, F:</span>{f_keys}
<span><span class='key first'></span>first query with F over {FORGOTTEN:g}</span></p>
{layers}
<script type="application/json" class=tokens>{_json(labels)}</script></section>"""


def _layer(masks: SentenceMasks, labels: Sequence[str], layer: int) -> str:
    mask_NN, forgotten_at = masks.masks[layer], masks.forgotten_at(layer)
    lags = sorted(at - j for j, at in enumerate(forgotten_at) if at is not None)
    summary = f"{len(lags)} of {len(labels)} tokens forgotten by the end"
    if lags:
        summary += f", half of these within {lags[(len(lags) - 1) // 2]} tokens"
    values = [[round(float(v), 2) for v in row[: i + 1]] for i, row in enumerate(mask_NN)]
    return f"""<details {"open" if layer < 4 else ""}><summary><h3>Layer {layer + 1}</h3> {summary}; largest F \
{mask_NN.max():.1f}</summary>
<p class=strip>{_strip(labels, forgotten_at)}</p>
<p class=note>The sentence; the number under a token says how many tokens later it was forgotten.</p>
<div class=scroll>{_heat_map(mask_NN, labels, forgotten_at, layer)}</div>
<p class=note>Row: the token that attends (query). Column: the earlier token that it attends to (key). Read a column
downwards to see a token being forgotten.</p>
<script type="application/json" class=mask>{_json(values)}</script></details>"""


def _strip(labels: Sequence[str], forgotten_at: Sequence[int | None]) -> str:
    chips = []
    for j, (label, at) in enumerate(zip(labels, forgotten_at, strict=True)):
        if at is None:
            css, lag, when = "kept", "", "kept to the end"
        else:
            css = f"f{7 - sum(at - j >= bound for bound in LAG_BANDS)}"
            lag, when = f"{at - j}", f"forgotten {at - j} tokens later, by “{labels[at]}” (token {at})"
        hover = escape(f"“{label}” (token {j}): {when}")
        chips.append(f"<span class='chip {css}' title='{hover}'>{escape(label)}<i>{lag}</i></span>")
    return "".join(chips)


def _heat_map(mask_NN: np.ndarray, labels: Sequence[str], forgotten_at: Sequence[int | None], layer: int) -> str:
    size = len(labels) * CELL
    cells: list[list[str]] = [[] for _ in F_BANDS]
    for i, j in zip(*np.nonzero(mask_NN >= F_BANDS[0]), strict=True):
        band = sum(mask_NN[i, j] >= bound for bound in F_BANDS) - 1
        cells[band].append(f"M{j * CELL} {i * CELL}h{CELL - 1}v{CELL - 1}h{1 - CELL}z")
    stairs = "".join(f"V{k * CELL}H{k * CELL - CELL}" for k in reversed(range(len(labels))))
    parts = [f"<path class=field d='M0 0V{size}H{size}{stairs}z' />"]
    parts += [f"<path class=f{band + 1} d='{''.join(path)}' />" for band, path in enumerate(cells) if path]
    first = "".join(f"M{j * CELL} {at * CELL}h{CELL - 1}" for j, at in enumerate(forgotten_at) if at is not None)
    parts.append(f"<path class=first d='{first}' />")
    for n, label in enumerate(labels):
        short = escape(label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…")
        middle = n * CELL + CELL / 2 + 3
        parts.append(f"<text class=token x=-5 y={middle} text-anchor=end>{short}</text>")
        parts.append(f"<text class=token transform='translate({middle} -5) rotate(-90)'>{short}</text>")
    whole, edge = size + LABEL + 20, -LABEL - 16
    return (
        f"<svg class=heat style='min-width:{size + LABEL}px;max-width:{1.25 * whole:.0f}px' data-cell={CELL} role=img "
        f"aria-label='Mask F of layer {layer + 1}' viewBox='{edge} {edge} {whole} {whole}'>"
        f"<text x={size / 2} y={edge + 11} text-anchor=middle>key: the token attended to</text>"
        f"<text transform='translate({edge + 11} {size / 2}) rotate(-90)' text-anchor=middle>"
        "query: the token that attends</text>"
        + "".join(parts)
        + "<rect class=cursor width=0 height=0 />"
        + "".join(f"<text class=readout x=100 y={y}></text>" for y in (20, 40, 60))
        + "</svg>"
    )


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
