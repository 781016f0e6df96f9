"""What has to be done for a study, as commands, and which of it is there already."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from launch.study.cells import SELECTIVE, Cell, Preset
from launch.study.measure import FOLDER, MEASURED, TRANSFER

TASKS_FILE, MADE_UP_FILE = "tasks.json", "synthetic.json"  # within a workdir's FOLDER
UNREACHED = ".unreached"  # behind a search's file where its target is out of reach: what the search said
_FACTORS = "4,16"  # of the caches that needle and variables are asked with
_TRANSFER_WINDOWS = 64
SEQUENCES, HELD = 640, "2,3,4,6,9,16,32"  # of made-up tasks, and tokens that a layer may hold


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
      kind: What jobs that take about as long share.
      name: For people.
      module, arguments: What `python -m` runs.
      output: It is done when this file is there.
      needs: Files of earlier jobs; without them it is left out.
      may_miss: Whether it is a search, whose target may be out of reach.
    """

    kind: str
    name: str
    module: str
    arguments: tuple[str, ...]
    output: Path
    needs: tuple[Path, ...] = ()
    may_miss: bool = False

    @property
    def done(self) -> bool:
        return self.output.exists() or (self.may_miss and unreached(self.output).exists())


def unreached(search: Path) -> Path:
    """The file that says of a search that its target is out of reach."""
    return search.with_name(search.name + UNREACHED)


def search_file(workdir: Path, policy: str) -> Path:
    return workdir / FOLDER / f"budgets-{policy}.json"


def jobs(preset: Preset, workdir: Path) -> list[Job]:
    """All of a study's, in the order of their worth: pairs of runs and their budgets, seed by seed, then the rest."""
    text = [cell for cell in preset.cells if not cell.made_up]
    made_up = [cell for cell in preset.cells if cell.made_up]
    paired = [cell for cell in text if len(cell.seeds) > 1]
    alone = [cell for cell in text if len(cell.seeds) == 1]
    found: list[Job] = []
    for seed in sorted({seed for cell in paired for seed in cell.seeds}):
        of_seed = [cell for cell in paired if seed in cell.seeds]
        found += [job for cell in of_seed for job in _run(cell, seed, preset, workdir)]
        found += [job for cell in of_seed for job in _searches(cell, seed, cell.policies, preset, workdir)]
    for cell in alone:
        found += [*_run(cell, cell.seeds[0], preset, workdir)]
        found += [*_searches(cell, cell.seeds[0], cell.policies, preset, workdir)]
    for cell in made_up:
        for seed in cell.seeds:
            found += _made_up(cell, seed, workdir)
    for cell in text:
        found += _searches(cell, cell.seeds[0], cell.first_policies, preset, workdir)
    found += [job for cell in paired for job in _transfers(cell, workdir)]
    found += [_tasks(cell, preset, workdir) for cell in text if cell.tasks and preset.questions]
    return found


def _train(cell: Cell, seed: int, workdir: Path) -> Job:
    run = f"{cell.name}-{seed}"
    arguments = [f"--config={cell.config}", f"--workdir={workdir / run}", f"--config.seed={seed}", *cell.overrides]
    arguments.append(f"--config.compilation_cache={workdir / 'compiled'}")  # the same programs for all seeds
    if cell.made_up:
        arguments += ["--config.mesh.data=1"]
    else:
        arguments += [f"--config.data.path={workdir / 'data'}"]
    kind = f"training {cell.config.partition(':')[2].split(',')[0]}"
    return Job(kind, f"training {run}", "trainer", tuple(arguments), workdir / run / "result.json")


def _run(cell: Cell, seed: int, preset: Preset, workdir: Path) -> Iterator[Job]:
    train = _train(cell, seed, workdir)
    yield train
    run = train.output.parent
    arguments = (str(run), f"--data={workdir / 'data'}", f"--windows={preset.windows}")
    measured = run / FOLDER / MEASURED
    yield Job("measuring", f"measuring {run.name}", "launch.study.measure", arguments, measured, (train.output,))


def _searches(cell: Cell, seed: int, policies: tuple[str, ...], preset: Preset, workdir: Path) -> Iterator[Job]:
    run, target = workdir / f"{cell.name}-{seed}", workdir / f"{cell.target}-{seed}"
    for policy in policies:
        output = search_file(run, policy)
        arguments = (
            "search", f"--checkpoint={run}", f"--data={workdir / 'data'}", f"--policy={policy}",
            f"--target-checkpoint={target}", f"--output={output}", *preset.search,
        )  # fmt: skip
        needs = (run / FOLDER / MEASURED, target / "result.json")  # the first makes the folder
        yield Job("search", f"budgets of {run.name}, {policy}", "launch.budgets", arguments, output, needs, True)


def _transfers(cell: Cell, workdir: Path) -> Iterator[Job]:
    """Each seed's model under the budgets of all seeds."""
    if SELECTIVE not in cell.policies or len(cell.seeds) < 2:
        return
    files = [search_file(workdir / run, SELECTIVE) for run in cell.runs]
    for run in cell.runs:
        budgets = f"--budgets={','.join(map(str, files))}"
        arguments = (str(workdir / run), f"--data={workdir / 'data'}", f"--windows={_TRANSFER_WINDOWS}", budgets)
        output = workdir / run / FOLDER / TRANSFER
        yield Job("transfer", f"others' budgets for {run}", "launch.study.measure", arguments, output, tuple(files))


def _tasks(cell: Cell, preset: Preset, workdir: Path) -> Job:
    run = workdir / cell.runs[0]
    output = run / FOLDER / TASKS_FILE
    policies = [policy for policy in (*cell.policies, *cell.first_policies) if policy != "sinks"][:3]
    arguments = (
        f"--checkpoint={run}", f"--data={workdir / 'data'}", "--tasks=needle,variables",
        f"--memory-factor={_FACTORS}", f"--policy={','.join(policies)}", f"--limit={preset.questions}",
        f"--output={output}",
    )  # fmt: skip
    measured = run / FOLDER / MEASURED
    return Job("tasks", f"needle and variables of {run.name}", "launch.evaluate", arguments, output, (measured,))


def _made_up(cell: Cell, seed: int, workdir: Path) -> Iterator[Job]:
    train = _train(cell, seed, workdir)
    yield train
    run = train.output.parent
    output = run / FOLDER / MADE_UP_FILE
    policies = "oldest" if "standard" in cell.config.split(",") else "selective,oldest"
    held = (f"--held={HELD}", f"--policy={policies}")
    arguments = (str(run), f"--sequences={SEQUENCES}", *held, f"--json={output}")
    yield Job("made-up task", f"measuring {run.name}", "launch.synthetic", arguments, output, (train.output,))
