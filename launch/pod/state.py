"""What `decide` is shown, what it remembers, what it says, and the limits of a run."""

import dataclasses
import enum

from .gcloud import Kind
from .record import duration


class Lock(enum.StrEnum):
    OURS = "ours"
    LOST = "lost"  # to another watcher
    REVOKED = "revoked"  # a stop or a delete took it
    UNKNOWN = "unknown"


class Nodes(enum.StrEnum):
    READY = "ready"
    WAIT = "wait"  # coming up or under repair
    GONE = "gone"
    UNKNOWN = "unknown"


class Setup(enum.StrEnum):
    NONE = "none"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


ABSENT, UNKNOWN = "ABSENT", "UNKNOWN"  # beside the states that the service names
SETTLE = 4  # looks for which a request that was just made may not be found
QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES")
DEAD = ("SUSPENDED", "FAILED")
FOR_GOOD = {
    "mistake": "a mistake in the config, the command or the data; no retry cures it",
    "out_of_memory": "out of memory: the model does not fit; no retry cures it",
    "diverged": "the training diverged, again after a rollback; no retry cures it",
    "crashed": "the trainer crashed again and again",
}
FINAL_CODES = ("3", "5", "7", "9")  # invalid argument, not found, permission denied, failed precondition
STAGES = {
    "provision": "coming up",
    "setup": "setting up the hosts",
    "silent": "the hosts' reports",
    "lost": "the network",
    "corrupt": "computing alike on all chips",
}


@dataclasses.dataclass(frozen=True)
class Observation:
    """One look. Nothing in it is older than the look."""

    lock: Lock = Lock.OURS
    request: str = UNKNOWN  # a state of the service, ABSENT only on an explicit "not found", else UNKNOWN
    ours: bool = False  # the request carries this run's label
    code: str = ""  # the service's own on why a request failed
    message: str = ""
    nodes: Nodes = Nodes.UNKNOWN
    node_detail: str = ""
    result: str = (
        "running"  # of the workers since they were last started: running, finished, lost, corrupt or one of FOR_GOOD
    )
    result_detail: str = ""
    beating: bool = False  # every host has written something new
    setup: Setup = Setup.NONE
    setup_detail: str = ""
    billed: float = 0.0  # seconds that slices were up in all


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of the run, and how patient the watcher is, in seconds."""

    max_attempts: int = 100
    max_hours: int = 720
    valid_until: str = ""  # as the person gave it; else requests are valid for DEFAULT_VALID and asked for again
    watch: bool = True  # make new slices
    places: int = 1  # that are tried in turn
    poll: float = 30.0
    provision: float = 7200.0
    repair: float = 3600.0
    silent: float = 1200.0
    setup: float = 3600.0
    backoff: float = 900.0  # at most between two requests that were refused
    max_setups: int = 5

    @property
    def settle(self) -> float:
        """How long a request that was just made may not be found yet."""
        return SETTLE * self.poll

    @property
    def valid(self) -> float:
        return duration(self.valid_until or DEFAULT_VALID)


DEFAULT_VALID = "24h"


@dataclasses.dataclass(frozen=True)
class Ending:
    """What the slice is being deleted for."""

    kind: str  # drop (a new one is made), finish or fail
    why: str
    stage: str = ""  # at which the slice failed, if that may be the fault of the run
    uncounted: bool = False  # the attempt never had machines
    code: int = 1


@dataclasses.dataclass(frozen=True)
class State:
    """What a watcher remembers between two looks. What outlives it is in the history."""

    attempt: int = 0  # the number of the last request that was made
    uncounted: int = 0
    stages: tuple[str, ...] = ()  # at which the last slices failed, one after another
    asked: float | None = None  # when the request was made, until it has been seen
    refused: Kind = Kind.OK  # what gcloud said to that
    refusal: str = ""
    refusals: int = 0  # in a row, with slices that never came up
    served: bool = False  # the nodes of this slice were ready
    next_ask: float = 0.0
    absences: int = 0  # looks in a row that found nothing
    gone: int = 0  # looks in a row that found a node gone
    queued: float | None = None
    granted: float | None = None
    unready: float | None = None
    ending_since: float | None = None  # the service is taking the slice away
    unlocked: float | None = None  # the bucket could not be read while the request could
    looked: float = 0.0
    set_up: bool = False
    tried: bool = False  # a slice of this watcher was set up
    setup_began: float | None = None
    setups: int = 0
    beat: float = 0.0
    has_beaten: bool = False
    ending: Ending | None = None
    saved: bool = False


@dataclasses.dataclass(frozen=True)
class Wait:
    """Looks again after a while."""


@dataclasses.dataclass(frozen=True)
class Create:
    attempt: int
    again: bool  # the same attempt, which was refused


@dataclasses.dataclass(frozen=True)
class SetUp:
    """Starts setting up the hosts, in the background."""


@dataclasses.dataclass(frozen=True)
class Save:
    """Lets the trainers save, for a while."""


@dataclasses.dataclass(frozen=True)
class Delete:
    """Deletes the request and its nodes, and looks again."""


@dataclasses.dataclass(frozen=True)
class Dropped:
    """The slice is gone and a new one will be asked for."""

    ending: Ending


@dataclasses.dataclass(frozen=True)
class End:
    """The watcher's end. finished, failed and ended say that no slice of the run is left; lost and foreign do not."""

    how: str  # finished, failed, ended (the slice is gone and --watch was not given), lost, foreign
    why: str = ""
    code: int = 0


Action = Wait | Create | SetUp | Save | Delete | Dropped | End
