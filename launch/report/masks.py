"""What a model forgets of one sentence: its tokens as a strip, and F as a heat map, for each layer.

Both are text as much as pictures: cells that the page's styles colour, and that its script finds by their place; it
only adds read-outs under the pointer.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from html import escape

import numpy as np

from data.tokenizer import legible

FORGOTTEN = 1.0  # F above which a token counts as forgotten, as tau in the paper's memory loss
F_BANDS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # lower bounds; one shade each
LAG_BANDS = (1, 4, 8, 16, 32)  # tokens until forgotten, lower bounds; the sooner, the stronger the shade
OPEN = 2  # layers of a run that are shown at once
CELL, LABEL, MAX_LABEL = 13, 84, 10  # of the heat map: pixels, pixels, characters


@dataclasses.dataclass(frozen=True)
class SentenceMasks:
    """F of every layer over one sentence."""

    pieces: list[str]  # of the tokenizer, BOS first
    masks: np.ndarray  # float32 [L, N, N], rows are queries

    def forgotten_at(self, layer: int) -> list[int | None]:
        """For each token the first query whose F on it exceeds FORGOTTEN, None if there is none."""
        over_NN = self.masks[layer] > FORGOTTEN
        return [int(column.argmax()) if column.any() else None for column in over_NN.T]


def masks_section(name: str, masks: SentenceMasks, most_layers: int) -> str:
    """At most so many layers, evenly picked."""
    count = len(masks.masks)
    picked = np.unique(np.linspace(0, count - 1, min(count, most_layers)).round().astype(int)).tolist()
    labels = [legible(piece) for piece in masks.pieces]
    layers = "".join(_layer(masks, labels, layer, place < OPEN) for place, layer in enumerate(picked))
    if len(picked) < count:
        layers = f"<p class=note>Of its {count} layers these are {len(picked)}.</p>{layers}"
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


def _layer(masks: SentenceMasks, labels: Sequence[str], layer: int, is_open: bool) -> str:
    mask_NN, forgotten_at = masks.masks[layer], masks.forgotten_at(layer)
    lags = sorted(at - j for j, at in enumerate(forgotten_at) if at is not None)
    summary = f"{len(lags)} of {len(labels)} tokens forgotten by the end"
    if lags:
        summary += f", half of these within {lags[(len(lags) - 1) // 2]} tokens"
    values = [[round(float(v), 2) for v in row[: i + 1]] for i, row in enumerate(mask_NN)]
    return f"""<details {"open" if is_open else ""}><summary><h3>Layer {layer}</h3> {summary}; largest F \
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
        f"aria-label='Mask F of layer {layer}' viewBox='{edge} {edge} {whole} {whole}'>"
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
