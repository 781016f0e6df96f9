"""What a plan of decoding says, and how `--json` writes it."""

import dataclasses

from launch.plan.result import CollectiveRow, Json, OversizedStep


@dataclasses.dataclass(frozen=True)
class Slice:
    """Where: a slice whose chips split rows of a batch over `data`, and heads over `tensor`."""

    topology: str
    chips: int
    tensor: int

    @property
    def data(self) -> int:
        """Parts of a batch."""
        return self.chips // self.tensor


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """What the compiler says of one step, in which each row draws a token and takes it in; on one chip."""

    hbm_bytes: dict[str, int]  # by what they hold, with the padding of tiles
    weight_bytes: int  # without padding
    cache_bytes: int  # without padding
    needed_bytes: int  # what a step has to read: weights and cache, each once
    step_ms_by_part: dict[str, float]  # estimated; of collectives, what is not hidden
    hidden_collectives_ms: float
    collectives: list[CollectiveRow]


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """A cache of as many rows as are planned."""

    name: str
    policy: str
    budgets: tuple[int, ...]  # slots of each layer
    memory_factor: float
    batch_size: int  # of the slice
    largest: bool  # whether the compiler refuses the next larger batch (see `batches`)
    hbm_total_bytes: int
    hbm_limit_bytes: float  # of a chip
    step_ms: float
    hbm_limit_ms: float  # in which a chip could read what it has to
    tokens_per_second: float  # of the slice
    tokens_per_second_per_chip: float
    tokens_per_dollar: float | None  # None where no price is known
    step: DecodeStep

    fits = True

    def to_json(self) -> Json:
        """What `--json` writes."""
        values = {"fits": True, **dataclasses.asdict(self)}
        return values | values.pop("step")


@dataclasses.dataclass(frozen=True)
class CacheDoesNotFit:
    """A cache of which not even the planned rows, or a single one a chip, fit."""

    name: str
    policy: str
    budgets: tuple[int, ...]
    memory_factor: float
    batch_size: int
    hbm_limit_bytes: float
    step: OversizedStep

    fits = False

    @property
    def error(self) -> str:
        return self.step.shortage.error

    def to_json(self) -> Json:
        """What `--json` writes."""
        values = {"fits": False, **dataclasses.asdict(self)}
        return values | values.pop("step")
