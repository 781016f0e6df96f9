"""One HTML page about several searches: perplexity against memory factor, per-layer budgets, and who survives."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from data import DataError, open_dataset
from data.tokenizer import legible
from inference_budget import POLICIES, BudgetsError, eviction_times, model_fingerprint
from inference_budget.interchange import budgets_of
from launch import charts
from launch.commands import InputError

from .inputs import load_model, read_windows
from .result import PointJson, SearchFile

SAMPLE = 96  # tokens of the sample that are shown
LINES = {  # of a search: how matplotlib and CSS draw them, and what they are
    "found": ("-", "solid", "found greedily"),
    "uniform": ("--", "dashed", "uniform budgets"),
    "pyramid": (":", "dotted", "PyramidKV's line"),
}
CHOSEN = {"uniform": ", uniform budgets", "exchange": ", after exchanges"}
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
STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--back); color: var(--ink) }
h2 { margin-top: 2.5rem } h4 { margin: 1rem 0 .2rem } p.note { color: var(--soft) }
.chart { display: flex; flex-wrap: wrap; gap: 0 2rem } .chart svg { display: block; flex: 1 1 340px; max-width: 600px }
.legend { list-style: none; margin: .5rem 0; padding: 0; font-size: .85rem } .legend i { display: inline-block;
  width: 2rem; margin-right: .6rem; vertical-align: middle; border-top: 2px solid var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
td:nth-child(-n + 2), th:nth-child(-n + 2) { text-align: left; white-space: nowrap }
td:first-child, th:first-child { padding-left: 0 }
@media (max-width: 48rem) {
  table, tbody, tr, td { display: block } tr:first-child { display: none } tr { margin-bottom: 1.2rem }
  td, td:nth-child(-n + 2) { display: flex; justify-content: space-between; padding: .1rem 0 }
  td:empty { display: none } td::before { content: attr(data-heading); color: var(--soft) } }
.tokens { font: 13px/1.7 ui-monospace, monospace; word-break: break-all } .tokens span { border-radius: 2px }
"""


def write_report(searches: Sequence[SearchFile], output: str | Path) -> None:
    """Writes the page, which needs no other file.

    Args:
      searches: contents of files of `search`. The first's tokens are shown as a sample, if its model and data are
        still there.
      output: HTML file.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Memory budgets</title>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        "<meta name=color-scheme content='light dark'>",
        f"<style>{charts.palette()}{STYLE}</style><h1>Memory budgets</h1>",
        "<p>A layer holds as many tokens as its budget; when it is full, each new token evicts one for good. The ",
        "memory factor is L N / sum of budgets. Evict, then attend; &lt;BOS&gt; is protected under every policy.</p>",
        _table_html(searches),
        "<h2>Perplexity against memory factor</h2><p class=note>On the search's training windows. A dot is what meets ",
        "the target; uniform budgets and PyramidKV's line have the totals of points of the search.</p>",
        _curves(searches),
        "<h2>Budgets by layer</h2><p class=note>Tokens that each layer holds at the target.</p>",
        _bars(searches),
        _survivors(searches[0]),
    ]
    Path(output).write_text("".join(parts), encoding="utf-8")


def _model(search: SearchFile) -> str:
    path = Path(search["checkpoint"]["path"])
    return path.parent.parent.name if path.parent.name == "export" else path.name  # an exported step: its run's name


def _name(search: SearchFile) -> str:
    return ", ".join(dict.fromkeys([_model(search), search["policy"]]))  # a model may be called as its policy


def _colour(search: SearchFile) -> str:
    """Of its policy; what has none of its own shares the last one's."""
    names = list(POLICIES)[: len(charts.SERIES)]
    return charts.SERIES[names.index(search["policy"]) if search["policy"] in names else -1]


def table(searches: Sequence[SearchFile]) -> list[list[str]]:
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


def _table_html(searches: Sequence[SearchFile]) -> str:
    names = [["model", "policy"], *([_model(search), search["policy"]] for search in searches)]
    head, *rows = ([*map(escape, [*name, *row[1:]])] for name, row in zip(names, table(searches), strict=True))
    parts = ["<h2>At the target, on held-out windows</h2><table><tr><th>", "<th>".join(head)]
    for row in rows:
        parts += ["<tr>", *(f"<td data-heading='{th}'>{td}" for th, td in zip(head, row, strict=True))]
    return "".join(parts) + "</table>"


def _by_model(searches: Sequence[SearchFile]) -> dict[str, list[SearchFile]]:
    by_model: dict[str, list[SearchFile]] = {}
    for search in searches:
        by_model.setdefault(_model(search), []).append(search)
    return by_model


def _lines(search: SearchFile) -> dict[str, list[PointJson]]:
    """By the names of LINES."""
    return {"found": search["curve"], **search["baselines"]}


def _curves(searches: Sequence[SearchFile]) -> str:
    """A chart for each model, all with the same axes, and a colour for each policy."""
    everything = [point for search in searches for points in _lines(search).values() for point in points]
    most = max(point["memory_factor"] for point in everything)
    low = min(point["perplexity"] for point in everything)
    high = max(point["perplexity"] for search in searches for point in search["curve"])
    target = max(search["search"]["target_perplexity"] for search in searches)
    high = min(high, target + max(2 * (target - low), 0.1 * low))  # what misses by far would flatten all else
    margin = 0.03 * (high - low or high)
    return "".join(
        f"<h3>{escape(model)}</h3>{_chart(model, of_model, most, (low - margin, high + margin))}"
        for model, of_model in _by_model(searches).items()
    )


def _chart(model: str, searches: Sequence[SearchFile], most: float, limits: tuple[float, float]) -> str:
    figure = charts.new_figure(460, 300)
    axes = charts.add_axes(figure, (56, 10, 446, 258), "memory factor: context over mean budget", "perplexity")
    axes.set_xscale("log", base=2)
    axes.set(xlim=(1, max(most, 2)), ylim=limits)
    powers = [2**n for n in range(int(math.log2(most)) + 1)]
    axes.set_xticks(powers, [f"{power}x" for power in powers])
    axes.locator_params(axis="y", nbins=6)
    legend = []
    for target in sorted({round(search["search"]["target_perplexity"], 2) for search in searches}):
        if limits[0] <= target <= limits[1]:
            axes.axhline(target, color=charts.INK, linewidth=1, clip_on=False)
            legend.append(_legend_line("solid", "ink", f"target {target:.2f}"))
    for search in searches:
        colour, found = _colour(search), search["found"]
        for name, points in _lines(search).items():
            ordered = sorted(points, key=lambda point: point["memory_factor"])
            factors = [point["memory_factor"] for point in ordered]
            perplexities = np.array([point["perplexity"] for point in ordered])
            perplexities[perplexities > limits[1]] = np.nan  # the line ends there
            axes.plot(factors, perplexities, LINES[name][0], color=colour, linewidth=2, clip_on=False)
        title = f"{search['policy']}: {found['memory_factor']:.2f}x, perplexity {found['perplexity']:.2f}"
        charts.add_dot(axes, found["memory_factor"], found["perplexity"], 10, colour, title=title)
        legend.append(_legend_line("solid", f"s{charts.SERIES.index(colour)}", search["policy"]))
    legend += [_legend_line(style, "soft", what) for _, style, what in LINES.values()]
    chart = charts.svg(figure, f"Perplexity of {model} against its memory factor")
    return f"<div class=chart>{chart}<ul class=legend>{''.join(dict.fromkeys(legend))}</ul></div>"


def _legend_line(style: str, colour: str, text: str) -> str:
    return f"<li><i style='border-top-style:{style};border-color:var(--{colour})'></i>{escape(text)}"


def _bars(searches: Sequence[SearchFile]) -> str:
    parts = []
    for model, of_model in _by_model(searches).items():
        parts.append(f"<h3>{escape(model)}</h3>")
        for search in of_model:
            title = f"{search['policy']}: {search['memory_factor']:.2f}x{CHOSEN.get(search.get('chosen', ''), '')}"
            parts.append(f"<h4>{escape(title)}</h4><div class=chart>{_bar_chart(search, title)}</div>")
    return "".join(parts)


def _bar_chart(search: SearchFile, title: str) -> str:
    budgets, length = search["budgets"], search["context_length"]
    figure, layers = charts.new_figure(460, 20 * len(budgets) + 4), range(len(budgets))
    axes = charts.add_axes(figure, (56, 2, 360, 20 * len(budgets) + 2))
    axes.grid(False)
    axes.set(xlim=(0, length), ylim=(len(budgets) - 0.5, -0.5), xticks=[])
    axes.barh(layers, [length] * len(budgets), height=0.7, color=charts.LINE)
    axes.barh(layers, budgets, height=0.7, color=_colour(search))
    axes.set_yticks(layers, [f"layer {layer}" for layer in layers])
    for layer, budget in enumerate(budgets):
        axes.text(1.02 * length, layer, f"{budget} of {length}", size=13, color=charts.SOFT, va="center")
    for bar in axes.patches:
        bar.set_clip_on(False)
    return charts.svg(figure, title)


def _survivors(search: SearchFile) -> str:
    """A held-out text, a shade for how long each token stays in each layer."""
    try:
        model, dataset = load_model(search["checkpoint"]["path"]), open_dataset(search["data"]["path"])
        budgets, policy = budgets_of(search, model_fingerprint(model))
        inputs = read_windows(dataset, "validation", budgets.context_length, 3).inputs
    except (InputError, BudgetsError, DataError) as error:
        return f"<p class=note>No sample is shown: {escape(str(error))}</p>"
    middle_1N = inputs[len(inputs) // 2][None]
    hidden_at = np.asarray(eviction_times(model, jnp.asarray(middle_1N), budgets, policy)[0])
    rows = hidden_at.shape[1]
    name = _name(search)
    note = " (its first key/value head)" if rows > 1 else ""
    parts = [
        f"<h2>Which tokens survive: {escape(name)}{note}</h2><p class=note>The first {SAMPLE} tokens ",
        f"of a held-out window of {budgets.context_length}. Strong: held to its end. Faint: evicted soon. Point ",
        "at a token to see by which one. &middot; is a space, ↵ a line break, [E2] a byte.</p>",
    ]
    tokenizer = dataset.tokenizer()
    pieces = [legible(tokenizer.piece(int(token))) for token in middle_1N[0]]
    for layer, hidden_at_N in enumerate(hidden_at[:, 0]):
        parts.append(f"<h3>layer {layer}: {budgets.tokens[layer]} tokens</h3><p class=tokens>")
        for j, piece in enumerate(pieces[:SAMPLE]):
            stays = int(hidden_at_N[j]) >= len(pieces)
            held = len(pieces) if stays else int(hidden_at_N[j]) - j
            life = math.log1p(held) / math.log1p(len(pieces))
            when = "held to the end" if stays else f"evicted by token {int(hidden_at_N[j])}, after {hidden_at_N[j] - j}"
            ink = "#fff" if life > 0.6 else "var(--ink)"
            shade = f"color-mix(in srgb,var(--s0) {8 + 92 * life:.0f}%,transparent)"
            parts.append(f'<span title="{j}: {when}" style="background:{shade};color:{ink}">{escape(piece)}</span>')
        parts.append("</p>")
    return "".join(parts)
