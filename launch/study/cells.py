"""What the study is: which runs there are, with which seeds, and what each is measured by."""

import dataclasses

from configs.experiments import CONFIGS

SELECTIVE, STANDARD = "selective", "standard"
# Who leaves a full layer, of a model that selects and of one that does not; the first is tried with every seed.
POLICIES = {SELECTIVE: ("selective", "oldest", "tova", "h2o", "sinks"), STANDARD: ("oldest", "sinks", "h2o", "tova")}
ABLATIONS = ("unprotected_bos", "unprotected_self", "leaky", "own_head")
RATES = (0.001, 0.003, 0.01)  # of the made-up tasks, for every variant


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone.

    Attributes:
      name: Before the seed in the names of its runs.
      config: As --config of the trainer takes it.
      seeds: One run for each.
      overrides: More flags of the trainer.
      policies: Of budget searches for each seed, to the perplexity of `target`'s run of that seed.
      first_policies: More of them, for the first seed alone.
      target: The cell without selection that it is compared with; empty where budgets are not searched for.
      tasks: Whether needle and variables are asked of the first seed's model.
    """

    name: str
    config: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    first_policies: tuple[str, ...] = ()
    target: str = ""
    tasks: bool = False

    @property
    def runs(self) -> list[str]:
        """The names of its runs."""
        return [f"{self.name}-{seed}" for seed in self.seeds]

    @property
    def made_up(self) -> bool:
        """Whether it is trained on a made-up task, without a dataset."""
        return self.config.startswith("configs/synthetic.py")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of the study.

    Attributes:
      vocab_size, record_length: Of its dataset.
      cells: In the order of their worth, since a study may be stopped at any time.
      search: Options of `python -m launch.budgets search`.
      questions: Of needle and of variables; with 0 none is asked, since a context may be too short for one.
      windows: That a model is measured on.
    """

    vocab_size: int
    record_length: int
    cells: tuple[Cell, ...]
    search: tuple[str, ...]
    questions: int
    windows: int


def _family(preset: str, option: str, seeds: tuple[int, ...], others: tuple[str, ...]) -> list[Cell]:
    """Standard and selective with all seeds, the others with the first; `option` is what they share, or empty."""
    ahead, config = f"{option}-" if option else "", ",".join(filter(None, [f"configs/study.py:{preset}", option]))
    target = f"{ahead}{STANDARD}"
    cells = []
    for variant, options in ((STANDARD, ",standard"), (SELECTIVE, "")):
        first, *more = POLICIES[variant]
        cells.append(
            Cell(f"{ahead}{variant}", config + options, seeds, (), (first,), tuple(more), target=target, tasks=True)
        )
    for name in others:
        of_standard = ",standard" if name == "heads2x" else ""
        searched = ("selective",) if name == "memory" else ()
        cells.append(
            Cell(f"{ahead}{name}", f"{config}{of_standard},{name}", seeds[:1], policies=searched, target=target)
        )
    return cells


def _made_up(task: str, seeds: tuple[int, ...], rates: tuple[float, ...], steps: int) -> list[Cell]:
    return [
        Cell(
            f"{task}-{variant}-{rate:g}",
            f"configs/synthetic.py:{task}{',standard' if variant == STANDARD else ''}",
            seeds,
            (f"--config.optimizer.peak_lr={rate:g}", f"--config.steps={steps}"),
        )
        for variant in (STANDARD, SELECTIVE)
        for rate in rates
    ]


_FIVE = (1, 2, 3, 4, 5)
PRESETS = {
    "toy": Preset(
        512,
        128,
        (
            *_family("toy", "", (1, 2), ("memory", "heads2x")),
            *_made_up("assignment", (1, 2), (0.003,), 4),
            *_made_up("parity", (1, 2), (0.003,), 4),
        ),
        ("--windows=4", "--validation-windows=4", "--first-step=32", "--step=16"),
        0,
        6,
    ),
    "small": Preset(
        1024,
        1024,
        (
            *_family("small", "", (1, 2, 3), ("memory", "heads2x")),
            *_made_up("assignment", _FIVE, (0.003,), 300),
            *_made_up("parity", _FIVE, (0.003,), 150),
        ),
        ("--windows=16", "--validation-windows=128", "--first-step=64", "--step=4", "--lazy"),
        60,
        128,
    ),
    "full": Preset(
        2048,
        1024,
        (
            *_family("full", "", _FIVE, ("memory", "heads2x", *ABLATIONS)),
            *_family("full", "n1024", _FIVE, ("memory",)),
            *_family("full", "wide", _FIVE[:1], ()),
            *_made_up("assignment", _FIVE, RATES, 1_000),
            *_made_up("parity", _FIVE, RATES, 1_000),
        ),
        ("--windows=32", "--validation-windows=256", "--first-step=64", "--step=2"),
        300,
        256,
    ),
}


def paper_runs() -> dict[str, str]:
    """The paper's runs: what their workdirs are called, and what --config takes, such as c4-d12-standard and
    configs/c4.py:d12,standard.

    Made-up tasks are left out, which the presets have.
    """
    text = (config for config in CONFIGS if "synthetic" not in config)
    return {
        config.removeprefix("configs/").replace(".py:", "-").replace(",", "-").replace(".", "_"): config
        for config in text
    }
