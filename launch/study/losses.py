"""The parts about loss: differences by seed, whether context is used, and how the difference lasts."""

from collections.abc import Mapping, Sequence

import numpy as np

from launch.study import figures
from launch.study.page import Block, Command, Figure, Heading, Table, Text
from launch.study.record import HEADS, MEMORY, SELECTIVE, STANDARD, Families, Record, RunRecord
from launch.study.statistics import Summary, paired_windows, summary

_BIN = 16  # positions
BySeed = Mapping[int, RunRecord]
Variants = Mapping[str, BySeed]


def differences(one: BySeed, other: BySeed, value: str = "loss") -> list[float]:
    """`one` minus `other` of each seed that both have, in the order of seeds."""
    found = []
    for seed in sorted(one.keys() & other.keys()):
        a, b = one[seed], other[seed]
        if a[value] is not None and b[value] is not None:  # type: ignore[literal-required]
            found.append(a[value] - b[value])  # type: ignore[literal-required]
    return found


def loss_blocks(record: Record) -> list[Block]:
    """Loss and bits per byte of every variant beside the standard model's."""
    blocks: list[Block] = [Heading("1. Loss, paired by seed")]
    blocks.append(
        Text(
            "Runs of one seed begin with the same values and see the same batches, so their difference is taken seed "
            "by seed. Loss is over the whole validation split, in nats per token; sd is over seeds (n - 1), the "
            "interval "
            "is Student's at 95%. Where there is one pair, there is no interval over seeds."
        )
    )
    found = Families.of(record).runs
    if not found:
        return [*blocks, Text("No run on text has finished.")]
    for number, (family, variants) in enumerate(found.items()):
        blocks += [Heading(family, small=True), _runs(variants)]
        blocks += _differences(variants, f"loss-{number}")
    blocks += _against_parameters(found)
    return [*blocks, Command("python -m trainer --config=configs/study.py:... --workdir=RUN --config.seed=SEED")]


def _runs(variants: Variants) -> Table:
    rows = []
    for name, by_seed in variants.items():
        runs = list(by_seed.values())
        bits = [run["bits_per_byte"] for run in runs if run["bits_per_byte"] is not None]
        rows.append(
            [
                name,
                ", ".join(map(str, sorted(by_seed))),
                f"{runs[0]['parameters']:,}",
                _mean_sd([run["loss"] or 0.0 for run in runs]),
                _mean_sd(bits) if bits else "",
            ]
        )
    return Table(["variant", "seeds", "parameters", "loss: mean, sd", "bits per byte: mean, sd"], rows)


def _mean_sd(values: Sequence[float]) -> str:
    of = summary(values)
    return f"{of.mean:.4f}" + (f" ± {of.sd:.4f}" if len(values) > 1 else "")


def _differences(variants: Variants, name: str) -> list[Block]:
    """Each variant minus standard, and selective minus twice the heads."""
    pairs = [(variant, STANDARD) for variant in variants if variant != STANDARD]
    pairs.append((SELECTIVE, HEADS))
    rows, shown = [], []
    for one, other in pairs:
        if not (values := differences(variants.get(one, {}), variants.get(other, {}))):
            continue
        of, bits = summary(values), differences(variants[one], variants[other], "bits_per_byte")
        title = one if other == STANDARD else f"{one} minus {other}"
        shown.append((title, of))
        rows.append([title, *spread(of), f"{np.mean(bits):+.4f}" if bits else "", _by_windows(variants, one, other)])
    if not rows:
        return [Text("There is no pair of runs with the same seed to compare.")]
    headings = ["minus standard, nats", "each seed", "mean", "sd", "95%", "bits per byte", "one pair, over windows"]
    figure = figures.points(shown, "loss minus standard's, nats per token", f"Differences of {len(rows)} variants")
    return [Table(headings, rows), Figure(name, "Loss minus that of the standard model: every seed, mean, 95%", figure)]


def spread(of: Summary, digits: int = 4) -> list[str]:
    """All values, mean, sd and interval, as cells."""
    values = ", ".join(f"{value:+.{digits}f}" for value in of.values)
    if len(of.values) < 2:
        return [values, f"{of.mean:+.{digits}f}", "", "one value"]
    return [values, f"{of.mean:+.{digits}f}", f"{of.sd:.{digits}f}", f"{of.low:+.{digits}f} to {of.high:+.{digits}f}"]


def _by_windows(variants: Variants, one: str, other: str) -> str:
    """For the first pair that was measured: these two models differ so much, on these windows of text."""
    for seed in sorted(variants[one].keys() & variants[other].keys()):
        a, b = variants[one][seed]["measured"], variants[other][seed]["measured"]
        if a and b:
            mean, error = paired_windows(a["windows"], b["windows"])
            return f"{mean:+.4f} ± {error:.4f} (se)"
    return ""


def _against_parameters(found: Mapping[str, Variants]) -> list[Block]:
    """Loss against parameters, where there are several sizes."""
    points: dict[str, list[tuple[float, float]]] = {}
    for variants in found.values():
        for name in (STANDARD, SELECTIVE, HEADS):
            for run in variants.get(name, {}).values():
                if run["bits_per_byte"] is not None:
                    points.setdefault(name, []).append((run["parameters"] / 1e6, run["bits_per_byte"]))
    sizes = {size for of in points.values() for size, _ in of}
    if len(sizes) < 2:
        return []
    lines = []
    for name, of in points.items():
        ordered = sorted({size for size, _ in of})
        lines.append((name, ordered, [float(np.mean([b for size, b in of if size == s])) for s in ordered]))
    svg = figures.lines(lines, ("parameters, millions", "bits per byte"), "Bits per byte against parameters", dots=True)
    return [Figure("loss-parameters", "Bits per byte against parameters: means over seeds and contexts", svg)]


def context_blocks(record: Record) -> list[Block]:
    """Whether the models use their context, without which budgets say nothing."""
    blocks: list[Block] = [
        Heading("Is context used?"),
        Text(
            "Budgets say something only of models that look far back. Below, the loss at each position of held-out "
            "windows; and for the last quarter of positions, by how much the loss grows when the first half of the "
            "window is taken away: the same targets, each with 128 to 256 instead of 384 to 512 tokens before it "
            "where N = 512. Where that is not above 0 for the standard models, no verdict about memory is given; what "
            "else was tried is in [Results](results.md#the-paper-at-small-scale)."
        ),
    ]
    rows = []
    for number, (family, variants) in enumerate(Families.of(record).runs.items()):
        lines = []
        for name, by_seed in variants.items():
            measured = [run["measured"] for run in by_seed.values() if run["measured"]]
            if not measured:
                continue
            loss_N = np.mean([one["by_position"] for one in measured], axis=0)
            usable = len(loss_N) // _BIN * _BIN
            binned = loss_N[:usable].reshape(-1, _BIN).mean(axis=1)
            if name in (STANDARD, SELECTIVE, MEMORY):
                lines.append((name, (np.arange(len(binned)) * _BIN + _BIN / 2).tolist(), binned.tolist()))
            quarter = len(loss_N) // 4
            third, last = loss_N[2 * quarter : 3 * quarter].mean(), loss_N[3 * quarter :].mean()
            worth = worths(by_seed)
            error = paired_windows(measured[0]["half_context"], measured[0]["last_quarter"])[1]
            cells = [f"{third:.4f}", f"{last:.4f}", *spread(summary(worth)), f"{error:.4f}"]
            rows.append([f"{name}, N = {len(loss_N):,}, {family.split(', ')[1]}", *cells])
        if lines:
            says = f"Loss by position, means of {_BIN} positions, over windows and seeds: {family}"
            svg = figures.lines(lines, ("position", "loss, nats per token"), "Loss by position")
            blocks.append(Figure(f"position-{number}", says, svg))
    if not rows:
        return [*blocks, Text("No run has been measured.")]
    headings = [
        "loss at positions", "third quarter", "last quarter", "worth of the first half, each seed", "mean", "sd", "95%",
        "se over windows, first seed",
    ]  # fmt: skip
    return [*blocks, Table(headings, rows), Command("python -m launch.study.measure RUN")]


def worths(by_seed: BySeed) -> list[float]:
    """Of each seed that was measured, what the context's first half is worth in the last quarter, nats."""
    measured = [run["measured"] for _, run in sorted(by_seed.items()) if run["measured"]]
    return [float(np.mean(one["half_context"]) - np.mean(one["last_quarter"])) for one in measured]


def lasting_blocks(record: Record) -> list[Block]:
    """The difference of validation losses as the runs went on."""
    blocks: list[Block] = [Heading("5. Does it last?")]
    lines, rows = [], []
    for family, variants in Families.of(record).runs.items():
        by_step: dict[int, list[float]] = {}
        for seed in variants.get(SELECTIVE, {}).keys() & variants.get(STANDARD, {}).keys():
            ours, theirs = (dict(variants[name][seed]["curve"]) for name in (SELECTIVE, STANDARD))
            for step in ours.keys() & theirs.keys():
                by_step.setdefault(step, []).append(ours[step] - theirs[step])
        if not by_step:
            continue
        steps = sorted(by_step)
        lines.append((family, steps, [float(np.mean(by_step[step])) for step in steps]))
        short = ", ".join(family.split(", ")[1:3])
        rows += [[f"{short}, step {step:,}", *spread(summary(by_step[step]))] for step in steps[-4:]]
    if not lines:
        return [*blocks, Text("There is no pair of runs that was evaluated on the way.")]
    title = "Selective minus standard against steps"
    svg = figures.lines(lines, ("training step", "difference, nats"), title, zero=True, dots=True)
    says = "Validation loss, selective minus standard, as training goes on: means over pairs, on a part of the split"
    headings = ["selective minus standard, nats", "each seed", "mean", "sd", "95%"]
    return [
        *blocks,
        Figure("steps", says, svg),
        Table(headings, rows),
        Text(
            "Training ends with a rate of nearly 0, so the last differences are those of models that are done; how "
            "the "
            "difference goes on in longer runs is seen only by training longer. A standard model that is trained "
            "on into "
            "a selective one is measured in [Results](results.md#uptraining)."
        ),
        Command("python -m launch.report RUN STANDARD_RUN -o DIR"),
    ]
