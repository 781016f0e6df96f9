"""The part about memory: how much less a model may hold at the standard model's perplexity, by policy."""

from collections.abc import Sequence

import numpy as np

from launch.study import figures
from launch.study.losses import Variants, spread
from launch.study.page import Block, Command, Figure, Heading, Table, Text
from launch.study.record import STANDARD, Families, Record, Search
from launch.study.statistics import Summary, factor_summary, summary

POLICY_NAMES = {"h2o": "H2O", "tova": "TOVA", "sinks": "sinks and window", "oldest": "window", "selective": "selective"}


def factors(variants: Variants, variant: str, policy: str) -> list[float]:
    """The memory factor of each seed, in their order, of a policy; 1 where the target was out of reach."""
    found = []
    for _, run in sorted(variants.get(variant, {}).items()):
        if policy in run["searches"]:
            found.append(run["searches"][policy]["memory_factor"])
        elif policy in run["unreached"]:
            found.append(1.0)
    return found


def searched(variants: Variants) -> list[tuple[str, str]]:
    """Variants and policies that were searched, in the order of the variants."""
    pairs = []
    for variant, by_seed in variants.items():
        found = {policy for run in by_seed.values() for policy in (*run["searches"], *run["unreached"])}
        pairs += [(variant, policy) for policy in POLICY_NAMES if policy in found]
    return pairs


def memory_blocks(record: Record) -> list[Block]:
    """Factors with what they cost on held-out windows, budgets by layer, and others' budgets."""
    blocks: list[Block] = [
        Heading("2. Memory at the standard model's perplexity"),
        Text(
            "The largest memory factor, context over mean budget, at which a model's perplexity on the search's "
            "training "
            "windows is at most that of the standard model of the same seed with everything held. Policies say who "
            "leaves "
            "a full layer; those of a standard model are what it would have without training for it. Differences "
            "are on "
            "held-out windows, of what the search found minus the target, with standard errors from pairs of "
            "windows; "
            "above zero by more than two of them, the factor did not hold there. A factor of 1 stands where the "
            "target was "
            "out of reach."
        ),
    ]
    found = {family: variants for family, variants in Families.of(record).runs.items() if searched(variants)}
    if not found:
        return [*blocks, Text("No budgets have been searched for.")]
    for number, (family, variants) in enumerate(found.items()):
        pairs = searched(variants)
        shown = [
            (_name(variant, policy), factor_summary(factors(variants, variant, policy))) for variant, policy in pairs
        ]
        blocks += [
            Heading(family, small=True),
            Figure(
                f"factors-{number}",
                "Memory factor at the standard model's perplexity: every seed, geometric mean, 95%",
                figures.points(shown, "memory factor", "Memory factors by policy", factors=True),
            ),
            _table(variants, pairs, shown),
            *_curves(variants, number),
            _budgets(variants),
            *_transfer(variants),
        ]
    command = (
        "python -m launch.budgets search --checkpoint RUN --data DATA --policy POLICY --target-checkpoint "
        "STANDARD_RUN "
        "--output RUN/study/budgets-POLICY.json"
    )
    return [*blocks, Command(command)]


def _name(variant: str, policy: str) -> str:
    return variant if policy == "selective" else f"{variant}: {POLICY_NAMES[policy]}"


def _of(variants: Variants, variant: str, policy: str) -> list[Search]:
    return [run["searches"][policy] for _, run in sorted(variants[variant].items()) if policy in run["searches"]]


def _table(variants: Variants, pairs: Sequence[tuple[str, str]], shown: Sequence[tuple[str, Summary]]) -> Table:
    rows = []
    for (variant, policy), (name, of) in zip(pairs, shown, strict=True):
        searches = _of(variants, variant, policy)
        differences = ", ".join(f"{s['minus_target']:+.4f} ± {s['standard_error']:.4f}" for s in searches)
        last = [np.log(s["last_quarter_perplexity"] / s["target_last_quarter_perplexity"]) for s in searches]
        interval = f"{of.low:.2f} to {of.high:.2f}" if len(of.values) > 1 else "one seed"
        each = ", ".join(f"{value:.2f}" for value in of.values)
        cells = [each, f"{of.mean:.2f}", interval, differences]
        rows.append([name, *cells, f"{np.mean(last):+.4f}" if searches else ""])
    headings = [
        "model: policy", "factor, each seed", "geometric mean", "95%", "held out, minus target: nats ± se, each seed",
        "the same in the last quarter of positions, mean",
    ]  # fmt: skip
    return Table(headings, rows)


def _curves(variants: Variants, number: int) -> list[Block]:
    """Perplexity against the factor for the first seed's searches."""
    lines, target = [], None
    for variant, policy in searched(variants):
        first = variants[variant][min(variants[variant])]
        if policy in first["searches"]:
            search = first["searches"][policy]
            curve = sorted(search["curve"])
            lines.append((_name(variant, policy), [x for x, _ in curve], [y for _, y in curve]))
            target = search["target_perplexity"]
    if not lines or target is None:
        return []
    most = target * 1.1  # what misses by far would flatten all else
    shown = []
    for name, xs, ys in lines:
        inside = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= most]
        if len(inside) > 1:
            shown.append((name, [x for x, _ in inside], [y for _, y in inside]))
    if not shown:
        return []
    end = max(xs[-1] for _, xs, _ in shown)
    shown.append(("target", [1.0, end], [target, target]))
    svg = figures.lines(shown, ("memory factor", "perplexity"), "Perplexity against memory factor", log_x=True)
    return [Figure(f"curves-{number}", "Perplexity on the search's windows as budgets are lowered, first seed", svg)]


def _budgets(variants: Variants) -> Table:
    rows = []
    for variant, policy in searched(variants):
        for seed, run in sorted(variants[variant].items()):
            if policy in run["searches"] and policy in ("selective", "oldest"):
                rows.append(
                    [f"{_name(variant, policy)}, seed {seed}", ", ".join(map(str, run["searches"][policy]["budgets"]))]
                )
    return Table(["budgets", "tokens held by each layer, from the first"], rows)


def _transfer(variants: Variants) -> list[Block]:
    """What budgets cost that were found for a model of another seed."""
    rows = []
    for variant, by_seed in variants.items():
        if variant == STANDARD:
            continue
        own, others = list[float](), list[float]()
        for run in by_seed.values():
            for one in run["transfer"]:
                (own if one["source"] == run["name"] else others).append(one["minus_full"])
        if own and others:
            rows.append([f"{variant}, own budgets", *spread(summary(own))])
            rows.append([f"{variant}, of other seeds", *spread(summary(others))])
    if not rows:
        return []
    headings = ["nats above a full cache", "each model and budgets", "mean", "sd", "95%"]
    command = "python -m launch.study.measure RUN --budgets OTHER_RUN/study/budgets-selective.json"
    return [
        Heading("Budgets of one seed for another", small=True),
        Text("Pairs that share a model or budgets are not independent: the interval of the last row is too narrow."),
        Table(headings, rows),
        Command(command),
    ]
