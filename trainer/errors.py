"""What the trainer raises for the person who started it."""


class ConfigError(ValueError):
    """A config that cannot run here; the message says which field, which value and what to do."""


class ResumeError(RuntimeError):
    """A workdir that this run must not continue."""
