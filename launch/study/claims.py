"""The paper's claims, and what the record says of each, by rules that are stated beside them."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from launch.study.asked import best_auc, right, solved
from launch.study.losses import Variants, differences, worths
from launch.study.memory import factors
from launch.study.page import Block, Heading, Table, Text
from launch.study.record import HEADS, MEMORY, SELECTIVE, STANDARD, Families, Record, counted
from launch.study.statistics import summary

SHOWN, NOT_SHOWN, NOT_TESTABLE = "shown", "not shown", "not testable here"
TELLS = 0.9  # AUC from which F tells what is stale
_ERRORS = 2  # standard errors that a held-out difference may be above its target


class Verdict(NamedTuple):
    """A row of the table."""

    claim: str
    verdict: str
    why: str
    rule: str


def verdicts(record: Record) -> list[Verdict]:
    """One for each claim, at the sizes of the record's runs."""
    return [_judge(record) for _judge in _JUDGES] + list(_elsewhere())


def claim_blocks(record: Record) -> list[Block]:
    """All verdicts as a table."""
    rows = [list(verdict) for verdict in verdicts(record)]
    return [
        Heading("The paper's claims"),
        Text(
            "Each verdict follows from the runs below by the rule in its row, and holds for models, text and steps "
            "of this "
            "size: nothing here has the paper's. No correction is made for there being several."
        ),
        Table(["claim", "verdict", "why", "rule"], rows, is_prose=True),
    ]


def _texts(record: Record) -> dict[str, Variants]:
    return dict(Families.of(record).runs)


def _verdict(claim: str, rule: str, outcomes: list[tuple[bool, str]], missing: str) -> Verdict:
    """Shown if every outcome is good."""
    if not outcomes:
        return Verdict(claim, NOT_TESTABLE, missing, rule)
    good = all(ok for ok, _ in outcomes)
    return Verdict(claim, SHOWN if good else NOT_SHOWN, "; ".join(why for _, why in outcomes), rule)


def _short(family: str) -> str:
    return ", ".join(family.split(", ")[1:3])


def _lower_loss(record: Record) -> Verdict:
    outcomes = []
    for family, variants in _texts(record).items():
        values = differences(variants.get(SELECTIVE, {}), variants.get(STANDARD, {}))
        if len(values) > 1:
            of = summary(values)
            outcomes.append((of.below_zero, f"{_short(family)}: {of.mean:+.4f} ({of.low:+.4f} to {of.high:+.4f})"))
    return _verdict(
        "Selective attention has a lower loss than the standard model, at every size and context",
        "the 95% interval of selective minus standard, paired by seed, is below 0 in every family that has two pairs",
        outcomes,
        "no family has two pairs of finished runs",
    )


def _like_more_heads(record: Record) -> Verdict:
    outcomes = []
    for family, variants in _texts(record).items():
        values = differences(variants.get(SELECTIVE, {}), variants.get(HEADS, {}))
        if values:
            of = summary(values)
            outcomes.append(
                (
                    of.mean <= 0 and not of.above_zero,
                    f"{_short(family)}: {of.mean:+.4f}, {counted(len(values), 'pair')}",
                )
            )
    return _verdict(
        "It is about as good as a standard model with twice the heads",
        "the mean of selective minus twice the heads, paired by seed, is at most 0; with one pair that is one "
        "observation",
        outcomes,
        "no pair of a selective model and one with twice the heads has finished",
    )


def _less_memory(record: Record) -> Verdict:
    outcomes = []
    for family, variants in _texts(record).items():
        ours = [
            r["searches"]["selective"] for r in variants.get(SELECTIVE, {}).values() if "selective" in r["searches"]
        ]
        if not ours or not _looks_back(variants):
            continue
        untrained = [f for policy in ("oldest", "tova", "h2o", "sinks") for f in factors(variants, STANDARD, policy)]
        if not untrained:
            continue
        held = all(s["minus_target"] <= _ERRORS * s["standard_error"] for s in ours)
        least, best = min(s["memory_factor"] for s in ours), max(untrained)
        outcome = "held" if held else "missed"
        why = f"{_short(family)}: {least:.2f}x at least, {best:.2f}x without selection, {outcome} on held-out text"
        outcomes.append((held and least > best, why))
    return _verdict(
        "At the standard model's perplexity it needs several times less memory than policies save without training "
        "for it",
        "every seed's factor is above that of every policy on a standard model, and held out the pruned model is "
        "above its "
        f"target by at most {_ERRORS} standard errors",
        outcomes,
        "no family whose standard models use the first half of their context has budgets of both kinds",
    )


def _looks_back(variants: Variants) -> bool:
    """Whether the standard models' loss grows on average where the first half of their context is taken away: of others
    any policy may drop what is far back.
    """
    found = worths(variants.get(STANDARD, {}))
    return bool(found) and sum(found) / len(found) > 0


def _memory_loss(record: Record) -> Verdict:
    outcomes = []
    for family, variants in _texts(record).items():
        with_loss = _factor_by_seed(variants, MEMORY)
        without = _factor_by_seed(variants, SELECTIVE)
        ratios = [with_loss[seed] / without[seed] for seed in sorted(with_loss.keys() & without.keys())]
        if ratios:
            least = min(ratios)
            outcomes.append((least > 1, f"{_short(family)}: {', '.join(f'{ratio:.2f}' for ratio in ratios)} times"))
    return _verdict(
        "With the memory loss the factor is several times larger still",
        "in every pair of one seed the factor with the memory loss is larger; one pair is one observation",
        outcomes,
        "no seed has budgets both with and without the memory loss",
    )


def _factor_by_seed(variants: Variants, variant: str) -> dict[int, float]:
    runs = variants.get(variant, {})
    return {s: r["searches"]["selective"]["memory_factor"] for s, r in runs.items() if "selective" in r["searches"]}


def _grows_with_context(record: Record) -> Verdict:
    by_length: dict[int, list[float]] = {}
    for variants in _texts(record).values():
        for run in variants.get(SELECTIVE, {}).values():
            if "selective" in run["searches"]:
                by_length.setdefault(run["context_length"], []).append(run["searches"]["selective"]["memory_factor"])
    lengths = sorted(by_length)
    if len(lengths) < 2:
        lengths = []
    means = [sum(by_length[n]) / len(by_length[n]) for n in lengths]
    why = ", ".join(f"{mean:.2f}x at N = {n:,}" for n, mean in zip(lengths, means, strict=True))
    return _verdict(
        "The factor grows with the context",
        "the mean factor of the selective models is larger at each longer context",
        [(means == sorted(means), why)] if lengths else [],
        "there are budgets of one context at most",
    )


def _ablations(record: Record) -> Verdict:
    outcomes = []
    for family, variants in _texts(record).items():
        for name in ("unprotected_bos", "unprotected_self", "leaky"):
            if values := differences(variants.get(name, {}), variants.get(SELECTIVE, {})):
                mean = sum(values) / len(values)
                outcomes.append((mean > 0, f"{_short(family)}, {name}: {mean:+.4f}, {counted(len(values), 'pair')}"))
    return _verdict(
        "Without the protection of <BOS> or of the token itself, or with a leaky ReLU, it is worse (a "
        "reproduction's finding)",
        "each one's mean difference to selective, paired by seed, is above 0",
        outcomes,
        "no ablation has finished",
    )


def _assignment(record: Record) -> Verdict:
    return _made_up(record, "assignment", "In variable assignment stale values are masked")


def _parity(record: Record) -> Verdict:
    return _made_up(record, "parity", "In parity all but the last two tokens are masked")


def _made_up(record: Record, task: str, claim: str) -> Verdict:
    """Only models that solve the task can show how."""
    runs = [r for r in record["runs"] if r["task"] == task and r["made_up"] and r["variant"] == SELECTIVE]
    able = [(run, auc) for run in runs if solved(run) and math.isfinite(auc := best_auc(run))]
    outcomes = []
    if able:
        least = min(auc for _, auc in able)
        longest = [right(max(run["made_up"], key=lambda at: at["length"])) for run, _ in able]
        why = f"{len(able)} of {len(runs)} selective runs solve it; AUC at least {least:.3f}"
        outcomes.append(
            (least >= TELLS, f"{why}; at the longest context {min(longest):.2%} to {max(longest):.2%} right")
        )
    return _verdict(
        claim,
        "in every selective run that solves the task, F of one layer tells what is stale with an AUC of at least "
        f"{TELLS}",
        outcomes,
        f"no selective run on {task} has been measured"
        if not runs
        else f"none of {len(runs)} selective runs solves it",
    )


def _elsewhere() -> Iterator[Verdict]:
    """What no run of this study can say."""
    rule = "needs what this machine has not"
    for claim, why in (
        ("16x, 25x and 47x less memory at N = 512, 1,024 and 2,048", "said of models of about 100M parameters on C4"),
        ("HellaSwag and other downstream gains", "models of this size are at chance; launch.evaluate measures it"),
        ("The same on C4, WikiText and lm1b, and with 32K tokens", "the text here is what every Python brings"),
        ("Encoder-decoders of T5's kind gain, too", "no run of this study is one"),
    ):  # fmt: skip
        yield Verdict(claim, NOT_TESTABLE, why, rule)


_JUDGES: tuple[Callable[[Record], Verdict], ...] = (
    _lower_loss, _like_more_heads, _less_memory, _memory_loss, _grows_with_context, _ablations, _assignment, _parity,
)  # fmt: skip
