"""The parts about questions: needle and variables in real text under budgets, and the made-up tasks."""

from statistics import median
from typing import Any

from launch.evaluate.results import Mean
from launch.study import figures
from launch.study.jobs import HELD, MADE_UP_FILE, SEQUENCES
from launch.study.memory import POLICY_NAMES
from launch.study.page import Block, Command, Figure, Heading, Table, Text
from launch.study.record import SELECTIVE, MadeUp, Record, RunRecord
from launch.study.statistics import summary

SOLVED = 0.99  # share of right answers from which a task counts as solved
TASKS = ("assignment", "parity")


def question_blocks(record: Record) -> list[Block]:
    """Needle, variables and downstream tasks, of the models that were asked."""
    blocks: list[Block] = [
        Heading("4. Needle, variables and other tasks under budgets"),
        Text(
            "Needle and variables: a line within held-out text gives a code, or a name its values again and again, "
            "and the end asks for it (`launch/evaluate/retrieval.py`). Accuracy is that of choosing among the "
            "answers, ± standard errors over questions; bits per byte of the right answer moves sooner, and stands "
            "as a paired difference to a full cache, too. Models that are at chance with a full cache cannot show "
            "what budgets cost. Whatever `launch.evaluate` writes into a run's `study/tasks*.json` is here, "
            "downstream tasks, too."
        ),
    ]
    rows = []
    for run in record["runs"]:
        for result in run["tasks"]:
            for task, found in result["tasks"].items():
                chance = "" if found["chance"] is None else f"{found['chance']:.3f}"
                cells = [run["name"], task, result["cache"], chance, _mean(found["metrics"].get("acc"))]
                bits = [_mean(found["metrics"].get("bits_per_byte"))]
                rows.append([*cells, *bits, _mean(found["minus_full_cache"].get("bits_per_byte"), "+")])
    if not rows:
        return [*blocks, Text("No model has been asked.")]
    headings = ["model", "task", "cache", "chance", "accuracy", "bits per byte", "minus full cache"]
    command = (
        "python -m launch.evaluate --checkpoint RUN --tasks needle,variables --memory-factor 4,16 --policy POLICY "
        "--output RUN/study/tasks.json"
    )
    return [*blocks, Table(headings, rows), Command(command)]


def _mean(found: Mean | None, sign: str = "") -> str:
    if found is None:
        return ""
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
    return f"{found['value']:{sign}.3f}{error}"


def made_up_blocks(record: Record) -> list[Block]:
    """Accuracy of every seed at every rate by length and by tokens held, and what is masked."""
    blocks: list[Block] = [
        Heading("6. Made-up tasks"),
        Text(
            "Variable assignment and parity (`data/tasks.py`), trained at the shortest length. Solved: "
            f"{SOLVED:.0%} of answers right there. Every variant got the same rates and steps. Models solve such a "
            "task or do not, so a mean over seeds says little: below are the share of seeds that solve it, and the "
            "median. AUC is how well F tells stale tokens from live ones in the layer that does it best; 0.5 is "
            "blind, but what is older is more often stale, so it stands beside that of age alone and of F before "
            "training. Masked are tokens whose F exceeds 1 nat."
        ),
    ]
    found = False
    for task in TASKS:
        runs = [run for run in record["runs"] if run["task"] == task and run["made_up"]]
        if not runs:
            blocks.append(Text(f"{task}: no run has been measured."))
            continue
        found = True
        for number, family in enumerate(dict.fromkeys(run["family"] for run in runs)):
            blocks += _task_blocks(f"{task}-{number}", task, [run for run in runs if run["family"] == family])
    if found:
        asked = f"--sequences={SEQUENCES} --held={HELD} --policy=selective,oldest"
        blocks.append(Command(f"python -m launch.synthetic RUN {asked} --json=RUN/study/{MADE_UP_FILE}"))
    return blocks


def _task_blocks(name: str, task: str, runs: list[RunRecord]) -> list[Block]:
    """Of one family, whose figures' files begin with `name`."""
    by_cell: dict[tuple[str, float], list[RunRecord]] = {}
    for run in runs:
        by_cell.setdefault((run["variant"], run["rate"]), []).append(run)
    lengths = sorted({at["length"] for run in runs for at in run["made_up"]})
    rows = [_made_up_row(variant, rate, of, lengths) for (variant, rate), of in sorted(by_cell.items())]
    shown = [
        (f"{variant}, rate {rate:g}, {length}", summary([right(at_length(run, length)) - 1 for run in of]))
        for (variant, rate), of in sorted(by_cell.items())
        for length in lengths
    ]
    headings = ["variant, rate", "seeds", "solved", *(f"median right at {n}" for n in lengths)]
    return [
        Heading(f"{task}: {runs[0]['family'].partition(', ')[2]}", small=True),
        Table(headings, rows),
        Figure(name, f"{task}: share of right answers, minus 1, at each length: every seed", figures.points(
            shown, "right answers minus 1", f"Accuracy on {task}")),
        *_held_blocks(name, task, runs),
        *_masked_blocks(task, [run for run in runs if run["variant"] == SELECTIVE]),
    ]  # fmt: skip


def _held_blocks(file: str, task: str, runs: list[RunRecord]) -> list[Block]:
    """Accuracy against tokens held, of every seed, at the rate that most seeds of the variant solve it with."""
    lines, rows = [], []
    for variant in dict.fromkeys(run["variant"] for run in sorted(runs, key=lambda run: run["variant"])):
        of_variant = [run for run in runs if run["variant"] == variant]
        rates = sorted({run["rate"] for run in of_variant})
        best = max(rates, key=lambda rate: sum(solved(run) for run in of_variant if run["rate"] == rate))
        of = [run for run in of_variant if run["rate"] == best]
        policies = dict.fromkeys(held["policy"] for run in of for held in trained_at(run)["held"])
        for policy in policies:
            name = f"{variant}: {POLICY_NAMES[policy]}"
            curves = [
                {held["tokens"]: 1 - held["wrong"] / held["answers"] for held in trained_at(run)["held"]
                 if held["policy"] == policy} for run in of
            ]  # fmt: skip
            lines += [(name, list(curve), list(curve.values())) for curve in curves]
            rows.append([f"{name}, rate {best:g}", *(_range([curve[k] for curve in curves]) for k in curves[0])])
    if not lines:
        return []
    tokens, ideal = lines[0][1], trained_at(runs[0])["ideal"]
    lines.append((f"a perfect memory holds {ideal:.1f}", [ideal, ideal], [0.0, 1.0]))
    axes = ("tokens that each layer holds", "share of right answers")
    svg = figures.lines(lines, axes, f"Accuracy on {task} by tokens held", log_x=True)
    says = f"{task}: share of right answers by tokens that each layer holds, with <BOS> and the current one: every seed"
    return [
        Figure(f"{file}-held", says, svg),
        Table(["right with so many held, of the seeds", *map(str, tokens)], rows),
    ]


def _range(shares: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{share:.1%}" for share in (min(shares), max(shares))))


def _masked_blocks(task: str, runs: list[RunRecord]) -> list[Block]:
    """What each selective run masks, layer by layer, and in assignment of which names."""
    rows = [
        [
            f"{run['name']}, layer {number}{'' if solved(run) else ', not solved'}",
            f"{layer['auc']:.3f}", f"{before['auc']:.3f}", f"{layer['stale_masked']:.1%}",
            f"{before['stale_masked']:.1%}", f"{layer['alive_masked']:.1%}", f"{before['alive_masked']:.1%}",
            *(_by_name(layer, trained_at(run)) if task == "assignment" else ()),
        ]
        for run in runs
        for number, (layer, before) in enumerate(zip(trained_at(run)["layers"], run["untrained"], strict=True))
    ]  # fmt: skip
    if not rows:
        return []
    headings = ["what is masked", "AUC", "before training", "stale masked", "before", "others masked", "before"]
    age = f"Age alone has an AUC of {trained_at(runs[0])['age_auc']:.3f}."
    if task == "assignment":
        headings += ["stale masked, name by name", "wrong answers, name by name"]
        age += (
            " A model may mask the stale values of some names and answer for the others without forgetting: then no "
            "layer's AUC is near 1, though the task is solved. The last columns show which model does, and where its "
            "mistakes are."
        )
    else:
        age += " What is stale is all that is older, so AUC says nothing here, and the share that is masked does."
    return [Text(age), Table(headings, rows)]


def _by_name(layer: dict[str, Any], at: MadeUp) -> list[str]:
    shares = ", ".join(f"{share:.0%}" for share in layer["stale_masked_after"].values())
    return [shares, ", ".join(f"{wrong:,}" for wrong in at["wrong_after"].values())]


def at_length(run: RunRecord, length: int) -> MadeUp:
    return next(at for at in run["made_up"] if at["length"] == length)


def right(at: MadeUp) -> float:
    """The share of right answers."""
    return 1 - at["wrong"] / at["answers"]


def trained_at(run: RunRecord) -> MadeUp:
    """A run's answers at the length that it was trained at."""
    return min(run["made_up"], key=lambda at: at["length"])


def solved(run: RunRecord) -> bool:
    """Whether a run solves its task where it was trained."""
    return right(trained_at(run)) >= SOLVED


def best_auc(run: RunRecord) -> float:
    """Of the layer that tells best, where the run was trained; 0.5 of a model that does not select."""
    return max((layer["auc"] for layer in trained_at(run)["layers"]), default=0.5)


def _made_up_row(variant: str, rate: float, of: list[RunRecord], lengths: list[int]) -> list[str]:
    count = sum(solved(run) for run in of)
    medians = [f"{median(right(at_length(run, length)) for run in of):.2%}" for length in lengths]
    return [f"{variant}, {rate:g}", str(len(of)), f"{count} of {len(of)}", *medians]
