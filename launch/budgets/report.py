"""One HTML page about several searches: perplexity against memory factor, per-layer budgets, and who survives."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from inference_budget.perplexity import eviction_times
from inference_budget.policies import POLICIES

from .inputs import Data, InputError, load_model, model_fingerprint
from .result import budgets_of

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
SAMPLE = 96  # tokens of the sample that are shown
HEADINGS = [
    "model, policy",
    "factor found",
    "full budgets",
    "pruned",
    "last quarter",
    "nats above target (or full)",
    "standard error",
    "largest factor at target here",
]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin-top:2.5rem}svg{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left;white-space:nowrap}
.tokens span{white-space:pre-wrap;border-radius:2px}.tokens{font-family:monospace;line-height:1.7}p.note{color:#666}"""


def write_report(searches: Sequence[dict[str, Any]], output: str | Path) -> None:
    """Writes the page, which needs no other file.

    Args:
      searches: contents of budgets.json files. The first's tokens are shown as a sample, if its model and data are
        still there.
      output: HTML file.

    Raises:
      InputError: the folder of `output` does not exist.
    """
    if not Path(output).parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {Path(output).parent}")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Memory budgets</title>",
        f"<style>{STYLE}</style><h1>Memory budgets</h1>",
        "<p>A layer holds as many tokens as its budget; when it is full, each new token evicts one for good. The ",
        "memory factor is L N / sum of budgets. Evict, then attend; &lt;BOS&gt; is protected under every policy.</p>",
        _table_html(searches),
        "<h2>Perplexity against memory factor</h2><p class=note>On the search's training windows. Solid: found ",
        "greedily, its dot what meets the target; dashed: uniform budgets; dotted: PyramidKV's line at equal ",
        "totals.</p>",
        _curves(searches),
        "<h2>Budgets by layer</h2><p class=note>Tokens that each layer holds at the target.</p>",
        *map(_bars, searches),
        _survivors(searches[0]),
    ]
    Path(output).write_text("".join(parts), encoding="utf-8")


def _model(search: dict[str, Any]) -> str:
    path = Path(search["checkpoint"]["path"])
    return path.parent.parent.name if path.parent.name == "export" else path.name  # an exported step: its run's name


def _name(search: dict[str, Any]) -> str:
    return f"{_model(search)}, {search['policy']}"


def _colour(search: dict[str, Any]) -> str:
    return COLOURS[list(POLICIES).index(search["policy"])]


def table(searches: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the searches found at their targets, measured on held-out windows; the first row has the headings."""
    rows = [HEADINGS]
    for search in searches:
        held_out = search["validation"]
        against = held_out.get("pruned_minus_target", held_out["pruned_minus_full"])
        holding = held_out.get("largest_at_target")
        rows.append(
            [
                _name(search),
                f"{search['memory_factor']:.2f}",
                f"{held_out['full']['perplexity']:.2f}",
                f"{held_out['pruned']['perplexity']:.2f}",
                f"{held_out['pruned']['last_quarter_perplexity']:.2f}",
                f"{against['nats']:+.4f}",
                f"{against['standard_error']:.4f}",
                "" if holding is None else f"{holding['memory_factor']:.2f}",
            ]
        )
    return rows


def _table_html(searches: Sequence[dict[str, Any]]) -> str:
    head, *rows = (map(html.escape, row) for row in table(searches))
    parts = ["<h2>At the target, on held-out windows</h2><table><tr><th>", "<th>".join(head)]
    parts += ["<tr><td>" + "<td>".join(row) for row in rows]
    return "".join(parts) + "</table>"


def _curves(searches: Sequence[dict[str, Any]]) -> str:
    """A chart for each model, all with the same axes, and a colour for each policy."""
    everything = [point for search in searches for points in _lines(search).values() for point in points]
    most = max(point["memory_factor"] for point in everything)
    low = min(point["perplexity"] for point in everything)
    high = max(point["perplexity"] for search in searches for point in search["curve"]) * 1.03
    by_model: dict[str, list[dict[str, Any]]] = {}
    for search in searches:
        by_model.setdefault(_model(search), []).append(search)
    return "".join(
        f"<h3>{html.escape(model)}</h3>{_chart(of_model, most, low, high)}" for model, of_model in by_model.items()
    )


def _chart(searches: Sequence[dict[str, Any]], most: float, low: float, high: float) -> str:
    width, height, left, right, bottom = 900, 360, 60, 140, 40

    def x(factor: float) -> float:
        return left + (width - left - right) * math.log(factor) / max(math.log(most), 1e-9)

    def y(perplexity: float) -> float:
        return 10 + (height - bottom - 10) * (1 - (min(perplexity, high) - low) / max(high - low, 1e-9))

    parts = [f'<svg viewBox="0 0 {width} {height}" role=img>']
    for factor in (2**n for n in range(int(math.log2(most)) + 1)):
        parts.append(
            f'<line x1={x(factor):.1f} x2={x(factor):.1f} y1=10 y2={height - bottom} stroke="#eee" />'
            f"<text x={x(factor):.1f} y={height - 20} text-anchor=middle font-size=13>{factor}x</text>"
        )
    for tick in np.linspace(low, high, 5):
        parts.append(f"<text x={left - 8} y={y(tick) + 4:.1f} text-anchor=end font-size=13>{tick:.1f}</text>")
    for n, search in enumerate(searches):
        colour = _colour(search)
        for dash, points in _lines(search).items():
            ordered = sorted(points, key=lambda point: point["memory_factor"])
            path = " ".join(f"{x(p['memory_factor']):.1f},{y(p['perplexity']):.1f}" for p in ordered)
            parts.append(
                f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=2 stroke-dasharray="{dash}" />'
            )
        found = search["found"]
        place = f"cx={x(found['memory_factor']):.1f} cy={y(found['perplexity']):.1f}"
        parts.append(
            f'<circle {place} r=5 fill="{colour}" />'
            f'<text x={width - right + 30} y={24 + 22 * n} font-size=14 fill="{colour}">&#9632; '
            f"{html.escape(search['policy'])}</text>"
        )
    return "".join(parts) + "</svg>"


def _lines(search: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    others = search["baselines"]
    return {"none": search["curve"], "8 5": others["uniform"], "2 4": others["pyramid"]}


def _bars(search: dict[str, Any]) -> str:
    budgets, length, colour = search["budgets"], search["context_length"], _colour(search)
    parts = [f"<h3>{html.escape(_name(search))}: {search['memory_factor']:.2f}x</h3>"]
    parts.append(f'<svg viewBox="0 0 900 {20 * len(budgets) + 4}" role=img>')
    for layer, budget in enumerate(budgets):
        parts.append(
            f"<text x=60 y={20 * layer + 15} text-anchor=end font-size=13>layer {layer}</text>"
            f'<rect x=70 y={20 * layer + 3} height=14 width=740 fill="#f2f2f2" />'
            f'<rect x=70 y={20 * layer + 3} height=14 width={740 * budget / length:.1f} fill="{colour}" />'
            f"<text x=820 y={20 * layer + 15} font-size=13>{budget} of {length}</text>"
        )
    return "".join(parts) + "</svg>"


def _survivors(search: dict[str, Any]) -> str:
    """A held-out text, a shade for how long each token stays in each layer."""
    try:
        model, data = load_model(search["checkpoint"]["path"]), Data(search["data"]["path"])
        budgets, policy = budgets_of(search, model_fingerprint(model))
        tokenizer = data.tokenizer
    except InputError as error:
        return f"<p class=note>No sample is shown: {html.escape(str(error))}</p>"
    inputs = data.windows("validation", budgets.context_length, 3).inputs[1:2]
    hidden_at = np.asarray(eviction_times(model, jnp.asarray(inputs), budgets, policy)[0])
    rows = hidden_at.shape[1]
    note = " (its first key/value head)" if rows > 1 else ""
    parts = [
        f"<h2>Which tokens survive: {html.escape(_name(search))}{note}</h2><p class=note>The first {SAMPLE} tokens ",
        f"of a held-out window of {budgets.context_length}. Dark: held to its end. Light: evicted soon. Point at ",
        "a token to see by which one.</p>",
    ]
    pieces = [tokenizer.id_to_piece(int(token)).replace("\u2581", " ") for token in inputs[0]]
    for layer, hidden_at_N in enumerate(hidden_at[:, 0]):
        parts.append(f"<h3>layer {layer}: {budgets.tokens[layer]} tokens</h3><p class=tokens>")
        for j, piece in enumerate(pieces[:SAMPLE]):
            stays = int(hidden_at_N[j]) >= len(pieces)
            held = len(pieces) if stays else int(hidden_at_N[j]) - j
            life = math.log1p(held) / math.log1p(len(pieces))
            when = "held to the end" if stays else f"evicted by token {int(hidden_at_N[j])}, after {hidden_at_N[j] - j}"
            ink = "#fff" if life > 0.6 else "#222"
            shade = 0.08 + 0.92 * life
            parts.append(
                f'<span title="{j}: {when}" style="background:rgba(31,119,180,{shade:.2f});color:{ink}">'
                f"{html.escape(piece)}</span>"
            )
        parts.append("</p>")
    return "".join(parts)
