"""The paper's claims, and what the record says of each, by rules that are stated beside them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from launch.study.asked import best_auc, right, solved, trained_at
from launch.study.losses import Variants, differences, worths
from launch.study.memory import factors
from launch.study.page import Block, Heading, Table, Text
from launch.study.record import HEADS, MEMORY, SELECTIVE, STANDARD, Families, Record, RunRecord, counted
from launch.study.statistics import summary

SHOWN, NOT_SHOWN, NOT_TESTABLE = "shown", "not shown", "not testable here"
TELLS = 0.9  # AUC from which F tells what is stale
MASKS = 0.9  # share of the stale tokens from which they count as all
_NO_FAMILY = "no family whose standard models use the first half of their context"
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
    for family, variants in _looking_back(record).items():
        ours = [
            r["searches"]["selective"] for r in variants.get(SELECTIVE, {}).values() if "selective" in r["searches"]
        ]
        if not ours:
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
        f"{_NO_FAMILY} has budgets of both kinds",
    )


def _looking_back(record: Record) -> dict[str, Variants]:
    """The families whose standard models' loss grows on average where the first half of their context is taken away:
    where it does not, any policy may drop what is far back, and no memory factor says anything.
    """
    return {family: of for family, of in _texts(record).items() if sum(worths(of.get(STANDARD, {}))) > 0}


def _memory_loss(record: Record) -> Verdict:
    outcomes = []
    for family, variants in _looking_back(record).items():
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
        f"{_NO_FAMILY} has budgets of one seed both with and without the memory loss",
    )


def _factor_by_seed(variants: Variants, variant: str) -> dict[int, float]:
    runs = variants.get(variant, {})
    return {s: r["searches"]["selective"]["memory_factor"] for s, r in runs.items() if "selective" in r["searches"]}


def _grows_with_context(record: Record) -> Verdict:
    by_length: dict[int, list[float]] = {}
    for variants in _looking_back(record).values():
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
        f"{_NO_FAMILY} has budgets, or they are all of one context",
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
    def told(run: RunRecord) -> tuple[bool, str]:
        return best_auc(run) >= TELLS, f"{best_auc(run):.3f}"

    return _made_up(
        record,
        "assignment",
        "In variable assignment stale values are masked",
        "in every selective run that solves the task, F of one layer tells what is stale with an AUC of at least "
        f"{TELLS}",
        ("AUC", told),
    )


def _parity(record: Record) -> Verdict:
    """Not by AUC: what is stale there is all that is older, so that age alone has an AUC of 1."""

    def masked(run: RunRecord) -> tuple[bool, str]:
        least = min((layer["stale_masked"] for layer in trained_at(run)["layers"]), default=0.0)
        return least >= MASKS, f"{least:.1%}"

    return _made_up(
        record,
        "parity",
        "In parity all but the last two tokens are masked",
        f"in every selective run that solves the task, every layer masks at least {MASKS:.0%} of them when the last "
        "result is to be given",
        ("least of the layers", masked),
    )


def _made_up(
    record: Record, task: str, claim: str, rule: str, measured: tuple[str, Callable[[RunRecord], tuple[bool, str]]]
) -> Verdict:
    """Only models that solve the task can show how."""
    runs = [r for r in record["runs"] if r["task"] == task and r["made_up"] and r["variant"] == SELECTIVE]
    able = [run for run in runs if solved(run)]
    outcomes = []
    if able:
        what, judge = measured
        found = [judge(run) for run in able]
        longest = [right(max(run["made_up"], key=lambda at: at["length"])) for run in able]
        why = f"{len(able)} of {len(runs)} selective runs solve it; {what}: {', '.join(said for _, said in found)}"
        at = f"at the longest context {min(longest):.2%} to {max(longest):.2%} right"
        outcomes.append((all(good for good, _ in found), f"{why}; {at}"))
    none = f"none of {len(runs)} selective runs solves it" if runs else f"no selective run on {task} has been measured"
    return _verdict(claim, rule, outcomes, none)


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
