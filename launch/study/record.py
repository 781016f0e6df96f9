"""One record of everything that a study's files say, from which its page is made: read here, computed nowhere else.

A run is known by its config, wherever it lies: what it is compared with follows from that. What was measured of it
stands beside it, in WORKDIR/study.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NotRequired, TypedDict

from etils import epath

from launch.budgets.result import PointJson, SearchFile
from launch.commands import InputError
from launch.evaluate.results import CacheResult
from launch.report.run import ReportError, read_run
from launch.study.jobs import MADE_UP_FILE, UNREACHED
from launch.study.measure import FOLDER, MEASURED, TRANSFER, Measured, Transferred
from launch.study.times import Time, clock_seconds, most_at_once
from trainer.metrics.json_lines import METRICS_FILE

FORMAT = "launch.study/1"
STANDARD, SELECTIVE, MEMORY, HEADS = "standard", "selective", "selective + memory loss", "standard, 2x heads"
Field = Callable[[str], Any]  # a field of a run's config, by its name with dots


class Search(TypedDict):
    """What a search for budgets found, on the windows that it had and on held-out ones."""

    memory_factor: float
    budgets: list[int]
    context_length: int
    target_perplexity: float
    perplexity: float  # of what was found, held out, as all that follows
    last_quarter_perplexity: float
    minus_target: float  # nats
    standard_error: float  # of that, from pairs of windows
    target_last_quarter_perplexity: float
    curve: list[tuple[float, float]]  # memory factor and perplexity, on the search's windows


class MadeUp(TypedDict):
    """Answers on a made-up task at one length."""

    length: int
    answers: int
    wrong: int
    sequences: int
    wrong_sequences: int
    ideal: float
    age_auc: float
    wrong_after: dict[str, int]
    layers: list[dict[str, Any]]  # as `launch.synthetic.Forgetting`
    held: list[dict[str, Any]]


class RunRecord(TypedDict):
    """One run."""

    name: str
    workdir: str
    state: str
    reason: str
    task: str  # empty for text
    family: str  # runs of one family are compared: they differ by variant and seed alone
    variant: str
    seed: int
    rate: float  # the peak learning rate
    context_length: int
    width: int
    parameters: int
    steps: int
    loss: float | None  # nats per token over the whole validation split; of a finished run
    bits_per_byte: float | None
    curve: list[tuple[int, float]]  # step and validation loss, on the way
    measured: Measured | None
    searches: dict[str, Search]  # by policy
    unreached: dict[str, str]  # by policy, what the search said of its target
    tasks: list[CacheResult]  # without single items
    made_up: list[MadeUp]
    untrained: list[dict[str, Any]]  # what its layers forgot of the made-up task before training
    transfer: list[Transferred]


class Record(TypedDict):
    """study.json."""

    format: str
    command: str  # that makes what is missing
    expected: list[str]  # names of runs
    runs: list[RunRecord]
    seconds: float  # by the clock, in which any command was at work, as far as it was noted
    processor_seconds: float  # of all commands
    at_once: int  # commands at work at once, at most
    commit: NotRequired[str]


def collect(folders: Iterable[str], expected: Sequence[str], command: str, times: Iterable[Time]) -> Record:
    """The record of all runs in the folders, which may be buckets'.

    Args:
      folders: Paths or URLs such as gs://bucket/runs.
      expected: Names of the runs that there should be.
      command: That would make them.
      times: As `times.read_times`.

    Raises:
      InputError: a folder is not there, has no run, or two runs have one name.
    """
    runs: dict[str, RunRecord] = {}
    for folder in folders:
        for name, workdir in _workdirs(folder):
            if name in runs:
                raise InputError(f"two runs have the name {name}: {workdir}; rename the folder of one")
            runs[name] = read(name, workdir)
    noted = list(times)
    return {
        "format": FORMAT,
        "command": command,
        "expected": list(expected),
        "runs": [runs[name] for name in sorted(runs)],
        "seconds": clock_seconds(noted),
        "processor_seconds": sum(time["processor_seconds"] for time in noted),
        "at_once": most_at_once(noted),
    }


def _workdirs(folder: str) -> list[tuple[str, epath.Path]]:
    """The names of runs, which their folders have, and their workdirs: those folders, or as the launcher has it,
    `workdir` within them.
    """
    path = epath.Path(folder)
    try:
        if not path.is_dir():
            raise InputError(f"{folder} is no folder; give one that has workdirs of the trainer in it")
        found = [
            (child.name, workdir)
            for child in path.iterdir()
            for workdir in (child, child / "workdir")
            if (workdir / METRICS_FILE).exists()
        ]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
    if not found:
        raise InputError(f"no folder in {folder} has a {METRICS_FILE}, as workdirs of the trainer have")
    return found


def read(name: str, workdir: epath.Path) -> RunRecord:
    """A run, and what was measured of it.

    Raises:
      InputError: a file of it cannot be read.
    """
    try:
        run = read_run(name, str(workdir))
    except ReportError as error:
        raise InputError(str(error)) from error
    folder = workdir / FOLDER
    field, result = run.field, run.result or {}
    validation = run.series("run/validation_loss")
    made_up = _made_up(folder / MADE_UP_FILE)
    return {
        "name": run.name,
        "workdir": run.workdir,
        "state": run.state,
        "reason": run.reason,
        "task": field("data.task") or "",
        "family": family(field, run.fingerprint),
        "variant": variant(field),
        "seed": int(field("seed") or 0),
        "rate": float(field("optimizer.peak_lr") or 0),
        "context_length": int(field("context_length") or 0),
        "width": int(field("model.width") or 0),
        "parameters": int(run.parameters.replace(",", "") or 0),
        "steps": run.step,
        "loss": result.get("loss"),
        "bits_per_byte": None if math.isnan(bits := result.get("bits_per_byte", math.nan)) else bits,
        "curve": list(zip(validation.steps, validation.values, strict=True)),
        "measured": _json(folder / MEASURED),
        "searches": {
            path.name.removeprefix("budgets-").removesuffix(".json"): _search(_json(path))
            for path in _named(folder, "budgets-", ".json")
        },
        "unreached": {
            path.name.removeprefix("budgets-").removesuffix(f".json{UNREACHED}"): path.read_text().strip()
            for path in _named(folder, "budgets-", UNREACHED)
        },
        "tasks": [result for path in _named(folder, "tasks", ".json") for result in _tasks(_json(path))],
        "made_up": [length for of_run in made_up.values() for length in of_run["lengths"]],
        "untrained": [layer for of_run in made_up.values() for layer in of_run["untrained"]],
        "transfer": _json(folder / TRANSFER) or [],
    }


def _made_up(path: epath.Path) -> dict[str, Any]:
    found: dict[str, Any] = _json(path) or {}
    if any("untrained" not in of_run for of_run in found.values()):
        raise InputError(f"{path} is an earlier version's; remove it, and the same command measures again")
    return found


def variant(field: Field) -> str:
    """What a run's config says about attention, in words."""
    heads, head_dim = field("model.num_heads") or field("model.width") or 0, field("model.head_dim") or 0
    d_model = field("model.d_model") or 64 * (field("model.width") or 0)
    if not field("model.selective"):
        name = STANDARD
    else:
        name = {"paper": SELECTIVE}.get(field("model.selection"), str(field("model.selection")))
    if (field("memory_loss.epsilon") or 0) > 0:
        name += " + memory loss"
    if d_model and heads * head_dim > d_model:
        name += f", {heads * head_dim / d_model:g}x heads"
    return name


def counted(number: int, thing: str) -> str:
    """Such as 1 layer, 2 layers."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def family(field: Field, fingerprint: str) -> str:
    """What runs that are compared have in common, in words."""
    task = field("data.task")
    width = field("model.width") or 0
    layers = field("model.num_layers") or width
    parts = [
        task or f"dataset {fingerprint[:8] or 'unknown'}",
        f"{counted(layers, 'layer')} of {field('model.d_model') or 64 * width}",
        f"N = {field('context_length') or 0:,}",
        f"vocabulary {field('model.vocab_size') or 0:,}",
        f"{field('steps') or 0:,} steps of {field('batch_size') or 0:,}",
    ]
    if not task:  # of which rates are compared, too
        parts.append(f"rate {field('optimizer.peak_lr') or 0:g}")
    return ", ".join(parts)


def _named(folder: epath.Path, prefix: str, suffix: str) -> list[epath.Path]:
    if not folder.exists():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(prefix) and p.name.endswith(suffix))


def _search(content: SearchFile) -> Search:
    held_out = content["validation"]
    against = held_out.get("pruned_minus_target", held_out["pruned_minus_full"])
    target = held_out.get("target", held_out["full"])
    return {
        "memory_factor": content["memory_factor"],
        "budgets": list(content["budgets"]),
        "context_length": content["context_length"],
        "target_perplexity": content["search"]["target_perplexity"],
        "perplexity": held_out["pruned"]["perplexity"],
        "last_quarter_perplexity": held_out["pruned"]["last_quarter_perplexity"],
        "minus_target": against["nats"],
        "standard_error": against["standard_error"],
        "target_last_quarter_perplexity": target["last_quarter_perplexity"],
        "curve": [_point(point) for point in content["curve"]],
    }


def _point(point: PointJson) -> tuple[float, float]:
    return round(point["memory_factor"], 4), round(point["perplexity"], 4)


def _tasks(content: Any) -> list[CacheResult]:
    results: list[CacheResult] = content["results"]
    for result in results:
        for task in result["tasks"].values():
            task["items"] = {}
    return results


def _json(path: epath.Path) -> Any:
    """None where there is no such file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and measure again") from error


@dataclasses.dataclass(frozen=True)
class Families:
    """A record's finished runs, as they are compared.

    Attributes:
      runs: By family, by variant, those that are named above first, and by seed.
    """

    runs: dict[str, dict[str, dict[int, RunRecord]]]

    @classmethod
    def of(cls, record: Record, task: str = "") -> "Families":
        """Of runs on text, or on one task."""
        found: dict[str, dict[str, dict[int, RunRecord]]] = {}
        for run in record["runs"]:
            if run["task"] == task and run["loss"] is not None:
                found.setdefault(run["family"], {}).setdefault(run["variant"], {})[run["seed"]] = run
        places = {name: place for place, name in enumerate((STANDARD, SELECTIVE, MEMORY, HEADS))}
        for family, variants in found.items():
            found[family] = dict(sorted(variants.items(), key=lambda of: (places.get(of[0], len(places)), of[0])))
        return cls(found)
