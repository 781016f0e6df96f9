"""The parts about questions: needle and variables in real text under budgets, and the made-up tasks."""

from statistics import median

from launch.evaluate.results import Mean
from launch.study import figures
from launch.study.page import Block, Command, Figure, Heading, Table, Text
from launch.study.record import SELECTIVE, MadeUp, Record, RunRecord
from launch.study.statistics import summary

SOLVED = 0.99  # share of right answers from which a task counts as solved
TASKS = ("assignment", "parity")


def question_blocks(record: Record) -> list[Block]:
    """Needle and variables, of the first seeds' models."""
    blocks: list[Block] = [
        Heading("4. Needle and variables under budgets"),
        Text(
            "A line within held-out text gives a code, or a name its values again and again, and the end asks for it "
            "(`launch/evaluate/retrieval.py`). Accuracy is that of choosing among the answers, ± standard errors "
            "over "
            "questions; bits per byte of the right answer moves sooner, here as paired differences to a full "
            "cache. Models "
            "that are at chance with a full cache cannot show what budgets cost."
        ),
    ]
    rows = []
    for run in record["runs"]:
        for result in run["tasks"]:
            for task, found in result["tasks"].items():
                chance = "" if found["chance"] is None else f"{found['chance']:.3f}"
                cells = [run["name"], task, result["cache"], chance, _mean(found["metrics"].get("acc"))]
                rows.append([*cells, _mean(found["minus_full_cache"].get("bits_per_byte"), "+")])
    if not rows:
        return [*blocks, Text("No model has been asked.")]
    headings = ["model", "task and length", "cache", "chance", "accuracy", "bits per byte, minus full cache"]
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
    """Accuracy by length of every seed at every rate, and what is masked."""
    blocks: list[Block] = [
        Heading("6. Made-up tasks"),
        Text(
            "Variable assignment and parity (`data/tasks.py`), trained at the shortest length. Solved: "
            f"{SOLVED:.0%} of "
            "answers right there. Every variant got the same rates and steps. Models solve such a task or do not, "
            "so a mean "
            "over seeds says little: below are the share of seeds that solve it, and the median. AUC is how well F "
            "tells "
            "stale values from live ones in the layer that does it best, 0.5 is blind."
        ),
    ]
    found = False
    for task in TASKS:
        runs = [run for run in record["runs"] if run["task"] == task and run["made_up"]]
        if not runs:
            blocks.append(Text(f"{task}: no run has been measured."))
            continue
        found = True
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
        headings = ["variant, rate", "seeds", "solved", *(f"median right at {n}" for n in lengths), "AUC, each seed"]
        blocks += [
            Heading(f"{task}: {runs[0]['family'].partition(', ')[2]}", small=True),
            Table(headings, rows),
            Figure(f"{task}", f"{task}: share of right answers, minus 1, at each length: every seed", figures.points(
                shown, "right answers minus 1", f"Accuracy on {task}")),
        ]  # fmt: skip
    if found:
        blocks.append(Command("python -m launch.synthetic RUN --sequences=1250 --json=RUN/study/synthetic.json"))
    return blocks


def at_length(run: RunRecord, length: int) -> MadeUp:
    return next(at for at in run["made_up"] if at["length"] == length)


def right(at: MadeUp) -> float:
    """The share of right answers."""
    return 1 - at["wrong"] / at["answers"]


def solved(run: RunRecord) -> bool:
    """Whether a run solves its task where it was trained."""
    return right(min(run["made_up"], key=lambda at: at["length"])) >= SOLVED


def best_auc(run: RunRecord) -> float:
    """Of the layer that tells best, where the run was trained; 0.5 of a model that does not select."""
    shortest = min(run["made_up"], key=lambda at: at["length"])
    return max((layer["auc"] for layer in shortest["layers"]), default=0.5)


def _made_up_row(variant: str, rate: float, of: list[RunRecord], lengths: list[int]) -> list[str]:
    count = sum(solved(run) for run in of)
    medians = [f"{median(right(at_length(run, length)) for run in of):.2%}" for length in lengths]
    auc = ", ".join(f"{best_auc(run):.3f}" for run in of) if variant.startswith(SELECTIVE) else ""
    return [f"{variant}, {rate:g}", str(len(of)), f"{count} of {len(of)}", *medians, auc]
