"""What the trainer raises for the person who started it, and the exit codes that launchers act on."""

import enum


class ExitCode(enum.IntEnum):
    """How the trainer ends: what each code means, and what a launcher makes of it. Any other code is a crash."""

    state: str  # as the worker of a pod calls it
    retried: bool  # started again: a retry may cure it
    shared: bool  # all hosts end alike; whatever else one of them ends with is a lost peer to the others

    FINISHED = 0, "finished", False, False
    FAILED = 1, "crashed", True, False  # the log says what
    MISTAKE = 2, "mistake", False, True  # in the command, the config or the data
    OUT_OF_MEMORY = 3, "out_of_memory", False, True  # does not fit the devices
    DIVERGED = 4, "diverged", False, True  # the numbers went bad again after a rollback
    CORRUPT = 5, "corrupt", False, True  # a chip computes wrongly; not again with the same hosts
    PEER_LOST = 70, "lost", True, False  # another host is gone, or hangs, or this one did: start all of them again
    PREEMPTED = 75, "interrupted", True, True  # saved, or nothing to save: run the same command again

    def __new__(cls, code: int, state: str, retried: bool, shared: bool) -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.state, member.retried, member.shared = state, retried, shared
        return member


(
    EXIT_FINISHED,
    EXIT_FAILED,
    EXIT_MISTAKE,
    EXIT_OUT_OF_MEMORY,
    EXIT_DIVERGED,
    EXIT_CORRUPT,
    EXIT_PEER_LOST,
    EXIT_PREEMPTED,
) = ExitCode


class ConfigError(ValueError):
    """A config that cannot run here; the message says which field, which value and what to do."""


class ResumeError(RuntimeError):
    """A workdir that this run must not continue."""


class LeaseError(RuntimeError):
    """A workdir that another run holds, or that cannot be taken."""


class StorageError(RuntimeError):
    """What the workdir holds cannot be read or written now."""


class DivergedError(RuntimeError):
    """Loss or gradients were bad again right after a rollback."""


class ReplicaError(RuntimeError):
    """Devices that should hold the same parameters do not."""
