"""What a plan says: of a step that compiles and of one that does not, and how `--json` writes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict

Json = dict[str, Any]  # an object of `json`


class CollectiveRow(TypedDict):
    """All collectives of one kind, axes, group size and network in a step."""

    kind: str
    axes: str
    size: int  # chips of a group, or slices
    network: str
    count: float
    bytes: float
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Step:
    """What the compiler says of a train step, on one chip where nothing else is said."""

    mesh: dict[str, int]
    hbm_bytes: dict[str, int]  # by what they hold
    state_bytes: int  # of all chips together
    argument_bytes: int
    step_ms_by_part: dict[str, float]  # estimated; of collectives, what is not hidden
    hidden_collectives_ms: float  # estimated: beside other work, by the program's schedule
    collectives: list[CollectiveRow]
    moved_shapes: Sequence[Sequence[int]]  # of collectives' results
    matmul_flops: float
    unscaled_matmul_flops: float  # with each body of a loop once, as `compiler_flops` has them
    compiler_flops: float
    hlo: str  # the optimised program; not in JSON


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What the compiler's refusal says."""

    error: str  # one line for a person
    of: str | None = None  # "VMEM"; by default HBM
    needed_bytes: float | None = None  # at least
    limit_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class OversizedStep:
    """A train step that the compiler refuses: its state alone, and what it is short of."""

    mesh: dict[str, int]
    hbm_bytes: dict[str, int]
    state_bytes: int
    shortage: Shortage


@dataclasses.dataclass(frozen=True)
class Place:
    """Where, and with what batch."""

    topology: str  # the slice's public name
    slices: int
    chips: int
    batch_size: int
    context_length: int


@dataclasses.dataclass(frozen=True)
class Run:
    """The whole run; what follows from the step's time is an estimate."""

    steps: int
    tokens: int
    days: float
    chip_hours: float
    checkpoint_bytes: int
    checkpoint_every_seconds: float
    checkpoints_kept: int
    checkpoints_kept_bytes: int
    dataset_bytes_for_one_epoch: int
    dataset_tokens: int | None = None  # of a dataset that is on this machine
    epochs: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step that compiles, and the run that is made of it."""

    place: Place
    hbm_total_bytes: int
    hbm_limit_bytes: float
    headroom: float  # share of the limit
    step_ms: float
    mfu: float
    tokens_per_second: float
    run: Run
    step: Step

    @property
    def fits(self) -> bool:
        return self.hbm_total_bytes <= self.hbm_limit_bytes

    @property
    def mesh(self) -> dict[str, int]:
        return self.step.mesh

    def to_json(self) -> Json:
        """What `--json` writes."""
        values = {"fits": self.fits, **_flat(self)}
        del values["hlo"]
        return values


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A step that the compiler refuses."""

    place: Place
    hbm_limit_bytes: float
    step: OversizedStep

    fits = False

    @property
    def mesh(self) -> dict[str, int]:
        return self.step.mesh

    @property
    def error(self) -> str:
        return self.step.shortage.error

    def to_json(self) -> Json:
        """What `--json` writes."""
        return {"fits": self.fits, **_flat(self)}


@dataclasses.dataclass(frozen=True)
class Impossible:
    """A mesh of a sweep that there is no plan of."""

    mesh: dict[str, int]
    error: str

    fits = False

    def to_json(self) -> Json:
        """What `--json` writes."""
        return {"fits": self.fits, **_flat(self)}


class Remedy(TypedDict, total=False):
    """A change that was compiled: `step_ms` and `headroom` where it fits, else `needs`."""

    change: str
    needs: str
    step_ms: float
    headroom: float


class ScalingRow(TypedDict, total=False):
    """One topology of a kind of scaling: `error`, or the plan's figures."""

    scaling: str  # "weak" or "strong"
    topology: str
    chips: int
    batch_size: int
    error: str
    step_ms: float
    mfu: float
    tokens_per_second: float
    headroom: float
    step_ms_by_part: dict[str, float]
    efficiency: float  # tokens/s of a chip, relative to the first topology of this kind that fits


def refusal(plan: Plan | DoesNotFit, otherwise: str) -> str:
    """Why a plan does not fit, in one line."""
    return plan.error if isinstance(plan, DoesNotFit) else otherwise


def _flat(of: Any) -> Json:
    """The fields that are known, among them those of the dataclasses in it; a run is kept apart."""
    values: Json = {}
    for field in dataclasses.fields(of):
        value = getattr(of, field.name)
        if isinstance(value, Run):
            values[field.name] = _flat(value)
        elif dataclasses.is_dataclass(value):
            values |= _flat(value)
        elif value is not None:
            values[field.name] = value
    return values
