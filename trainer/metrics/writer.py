"""Where a run's numbers go: what a writer can be told, and all writers of a run as one."""

from collections.abc import Iterable, Mapping


class MetricsWriter:
    """One place that a run's numbers go to.

    Methods do nothing, so that a subclass has only those that it needs; `examples/metrics_writer.py` is one. Only
    process 0 has writers. They are called from the training loop, which waits for them.
    """

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Values after update number `step`, by name; a slash in a name groups charts."""

    def text(self, step: int, name: str, markdown: str) -> None:
        """Something to read, such as the config."""

    def image(self, step: int, name: str, png: bytes) -> None:
        """A picture, as the bytes of a PNG file."""

    def hparams(self, step: int, values: Mapping[str, bool | float | str]) -> None:
        """The fields of the run's config, by their names with dots, from `step` on."""

    def withdraw(self, first_step: int) -> None:
        """What was written from this step on no longer holds, since it will be computed again."""

    def flush(self) -> None:
        """Returns when everything written so far is where it goes to, or was refused for now."""

    def close(self) -> None:
        """Flushes; nothing is written afterwards."""


class Metrics(MetricsWriter):
    """All writers of a run as one; with none, as on all hosts but the first, it does nothing."""

    def __init__(self, writers: Iterable[MetricsWriter]) -> None:
        self._writers = list(writers)
        self._last_steps: dict[str, int] = {}

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Each scalar once a step: what two parts of the loop say of the same step is taken from the first."""
        new = {name: value for name, value in scalars.items() if step > self._last_steps.get(name, -1)}
        self._last_steps |= dict.fromkeys(new, step)
        if new:
            for writer in self._writers:
                writer.write(step, new)

    def text(self, step: int, name: str, markdown: str) -> None:
        for writer in self._writers:
            writer.text(step, name, markdown)

    def image(self, step: int, name: str, png: bytes) -> None:
        for writer in self._writers:
            writer.image(step, name, png)

    def hparams(self, step: int, values: Mapping[str, bool | float | str]) -> None:
        for writer in self._writers:
            writer.hparams(step, values)

    def withdraw(self, first_step: int) -> None:
        self._last_steps = {name: min(step, first_step - 1) for name, step in self._last_steps.items()}
        for writer in self._writers:
            writer.withdraw(first_step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
