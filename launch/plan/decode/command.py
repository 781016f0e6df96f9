"""`python -m launch.plan --decode`: which caches it plans, and what it says of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from launch.plan.decode import caches, chart, tables
from launch.plan.decode.caches import CacheChoice
from launch.plan.decode.compiler import measure
from launch.plan.decode.planner import make_slice, plan
from launch.plan.decode.result import CacheDoesNotFit, DecodePlan, Slice
from launch.plan.result import Json
from launch.plan.several import compile_all
from launch.slices import Topology
from selective_attention import TransformerConfig
from trainer.errors import ConfigError

MINUTES = 2.0  # of one core for a cache of d12, whose largest batch takes about three compilations to find
MINUTES_OF_ONE = 0.5  # where the batch is given


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the flags say."""

    budgets: Sequence[str]  # files
    factors: Sequence[str]
    batch: int | None  # of the slice; None for the largest
    mesh: dict[str, int]
    price: float  # dollars for an hour of a chip; 0 where that is not known
    cache_dtype: str | None = None  # of keys and values; None for the model's


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The plans of all caches."""

    plans: list[DecodePlan | CacheDoesNotFit]
    place: Slice
    config: TransformerConfig
    context_length: int
    cache_dtype: str | None
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether any of them does."""
        return any(plan.fits for plan in self.plans)

    def to_json(self) -> Json:
        """What `--json` writes."""
        place = dataclasses.asdict(self.place) | {"data": self.place.data, "context_length": self.context_length}
        place["cache_dtype"] = self.cache_dtype or self.config.dtype
        return {**place, "plans": [plan.to_json() for plan in self.plans]}

    def table(self) -> str:
        """What is printed."""
        return tables.plan_table(self.plans, self.place, self._title, self.notes)

    def draw(self, path: str) -> None:
        """Draws tokens/s against the memory factor, as PNG."""
        shared = f", heads over {self.place.tensor} chips" if self.place.tensor > 1 else ""
        chart.draw(self.plans, f"{self._title}, on {self.place.topology}{shared}", path)

    @property
    def _title(self) -> str:
        c = self.config
        millions = c.parameter_counts()["total"] / 1e6
        dtype = c.dtype if self.cache_dtype in (None, c.dtype) else f"{c.dtype}, cache in {self.cache_dtype}"
        return f"{c.num_layers} layers, {millions:,.0f}M parameters, {dtype}, N = {self.context_length:,}"


def plan_decoding(config: TransformerConfig | None, topology: Topology, asked: Asked, listed: str = "") -> Decoding:
    """Plans the caches of a model: of `config`, else of the checkpoint that the file of budgets names.

    Args:
      config: the model, if it was named.
      topology: the slice.
      asked: what to plan.
      listed: of when the price is, if it is the list price.

    Raises:
      ConfigError: what is asked for cannot be.
      RuntimeError: compiling failed for another reason than memory.
    """
    factors = [_factor(text) for text in asked.factors]
    if not (asked.budgets or factors):
        raise ConfigError("--decode needs --budgets=FILE or --memory-factor, such as --memory-factor=1,4,16,47")
    if config is None and not asked.budgets:
        raise ConfigError("--decode needs --config, or --budgets=FILE, whose model is planned then")
    found = []
    for path in asked.budgets:
        config, budgets, policy = caches.read_budgets(path, config)
        name = Path(path).stem
        found.append((f"{name}.json" if name in (caches.STANDARD, caches.FULL) else name, budgets, policy))
    assert config is not None  # it was given, or is a file's
    lengths = sorted({budgets.context_length for _, budgets, _ in found}) or [config.max_length]
    if len(lengths) > 1:
        raise ConfigError(f"--budgets: files for contexts of {lengths[0]} and {lengths[-1]} tokens are planned apart")
    compared = caches.choices(config, lengths[0], factors, found, asked.cache_dtype)
    place = make_slice(config, topology, asked.mesh, asked.batch)

    def one(choice: CacheChoice) -> DecodePlan | CacheDoesNotFit:
        return plan(choice, topology, place, asked.batch, asked.price, measure)

    minutes = MINUTES if asked.batch is None else MINUTES_OF_ONE
    plans = compile_all(one, compared, "caches", minutes)
    return Decoding(plans, place, config, lengths[0], asked.cache_dtype, _notes(asked, factors, listed))


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--memory-factor: {text!r} is not a number") from None


def _notes(asked: Asked, factors: Sequence[float], listed: str) -> list[str]:
    """What a reader of the figures has to know."""
    notes = []
    if any(factor != 1 for factor in factors):
        notes.append("Uniform budgets, N / factor: a trained model's come from launch.budgets search.")
    notes.append("A cache counts with all its slots, however many are taken.")
    if asked.cache_dtype == "int8":
        notes.append("int8 keys and values have a bfloat16 scale for each token and head.")
    if asked.price:
        source = f" (list of {listed}, on demand)" if listed else ""
        notes.append(f"At {asked.price:g} dollars a chip-hour{source}.")
    return notes
