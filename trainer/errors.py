"""What the trainer raises for the person who started it, and the exit codes that launchers act on."""

EXIT_FINISHED = 0
EXIT_FAILED = 1  # the log says what
EXIT_MISTAKE = 2  # in the command, the config or the data: no retry will cure it
EXIT_OUT_OF_MEMORY = 3  # does not fit the devices: no retry will cure it
EXIT_DIVERGED = 4  # the numbers went bad again after a rollback: no retry will cure it
EXIT_PEER_LOST = 70  # another host is gone, or hangs, or this one did: start all of them again
EXIT_PREEMPTED = 75  # interrupted, saved (or nothing to save): run the same command again


class ConfigError(ValueError):
    """A config that cannot run here; the message says which field, which value and what to do."""


class ResumeError(RuntimeError):
    """A workdir that this run must not continue."""


class StorageError(RuntimeError):
    """Checkpoints cannot be written."""


class DivergedError(RuntimeError):
    """Loss or gradients were bad again right after a rollback."""


class ReplicaError(RuntimeError):
    """Devices that should hold the same parameters do not."""
