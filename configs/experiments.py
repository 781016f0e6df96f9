"""The paper's experiments as configs, and the plan's figures for them, as `python -m configs.list` prints them."""

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import TypedDict

from ml_collections import ConfigDict

from configs import c4, synthetic

PLANS_FILE = Path(__file__).with_name("plans.json")
# What a train step's program depends on; the rest of a config only says on what, for how long and how fast.
_OF_THE_STEP = ("context_length", "batch_size", "accumulation", "model", "memory_loss", "mesh")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs that are compared with each other."""

    compare: str  # what, and what to expect by the paper
    configs: tuple[str, ...]  # as --config takes them


class StepPlan(TypedDict):
    """What `python -m launch.plan` says of a train step, as PLANS_FILE has it."""

    topology: str
    chips: int
    fits: bool
    headroom: float  # share of a chip's HBM that is left
    step_ms: float  # estimated
    price: float  # list price, dollars a chip-hour; 0 where there is none
    price_date: str
    commit: str  # that it was made at


def _family(file: str, stems: tuple[str, ...], *options: str) -> tuple[str, ...]:
    return tuple(f"configs/{file}.py:{stem}{option}" for stem in stems for option in options)


_CONTEXTS = tuple(f"d12,n{length}" for length in c4.CONTEXT_LENGTHS)
EXPERIMENTS = {
    "sizes": Experiment(
        "Validation perplexity: selective below standard at every size, about equal to standard with twice the heads.",
        _family("c4", tuple(f"d{width}" for width in c4.WIDTHS), "", ",standard", ",memory", ",standard,heads2x"),
    ),
    "contexts": Experiment(
        "Memory factor at the standard run's perplexity, by launch.budgets: the paper has 16x, 25x and 47x with memory "
        "loss, and about 5x, 7x and 8x without.",
        _family("c4", _CONTEXTS, "", ",standard", ",memory"),
    ),
    "vocabulary": Experiment(
        "The difference in bits per byte: like that with 8K.", _family("c4", ("d12,vocab32k",), "", ",standard")
    ),
    "wikitext": Experiment("The difference in perplexity: like C4's.", _family("wikitext", ("d12",), "", ",standard")),
    "lm1b": Experiment("The difference in perplexity: like C4's.", _family("lm1b", ("d12",), "", ",standard")),
    "learning_rates": Experiment(
        "Each variant at its own best rate, beside that of d12 and d12,standard in `sizes`.",
        _family("c4", ("d12",), *(f"{v},lr{r}" for r in c4.LEARNING_RATES for v in ("", ",standard"))),
    ),
    "ablations": Experiment(
        "Validation perplexity beside d12 in `sizes`. A reproduction had it worse without a protection and with leaky.",
        _family("c4", ("d12",), *(f",{name}" for name in c4.ABLATIONS)),
    ),
    "encoder_decoder": Experiment(
        "Validation loss of filling blanks, T5-style: selective below standard.",
        _family("t5", ("d12",), "", ",standard", ",memory"),
    ),
    "synthetic": Experiment(
        "By launch.synthetic: accuracy at longer contexts, and whether F tells what is stale.",
        _family("synthetic", synthetic.TASKS, "", ",standard"),
    ),
}
CONFIGS = tuple(dict.fromkeys(config for experiment in EXPERIMENTS.values() for config in experiment.configs))


def load(config: str) -> ConfigDict:
    """The config of a value of --config that names a file of this folder."""
    file, _, variant = config.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return module.get_config(variant) if variant else module.get_config()


def step_key(config: ConfigDict) -> str:
    """Equal for configs whose train step is the same program."""
    content = {name: value for name, value in config.to_dict().items() if name in _OF_THE_STEP}
    if config.model.architecture == "decoder":
        del content["model"]["architecture"]
    else:
        content["corruption"] = config.data.corruption.to_dict()
    content["clips"] = config.optimizer.clip_norm > 0
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_plans() -> dict[str, StepPlan]:
    """The figures there are, by `step_key`; `make results` makes them."""
    return json.loads(PLANS_FILE.read_text())
