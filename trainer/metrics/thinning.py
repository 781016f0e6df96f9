"""Which steps' numbers are kept over a long run: all at first, later ever fewer, but all of them around trouble."""

from collections.abc import Mapping

from trainer.metrics.writer import MetricsWriter

_DENSE_STEPS = 13  # binary digits: up to step 8,191 every step is kept
_DENSE_AFTER_TROUBLE = 64  # steps


def is_kept(step: int, every: int = 1) -> bool:
    """Whether this step's numbers are written, of those that are due `every` so many steps: by the step alone, so that
    restarts change nothing. From step 8,192 on it is every second, from 16,384 on every fourth, and so on.
    """
    return step % (every << max(0, step.bit_length() - _DENSE_STEPS)) == 0


class Thinned:
    """Writes the scalars of the steps that are kept, and once there is trouble what was left out right before it."""

    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer
        self._left_out: dict[int, Mapping[str, float]] = {}  # since the last step that was written
        self._dense_until = 0

    def write(self, step: int, scalars: Mapping[str, float], trouble: bool) -> None:
        """To be called for each step, in order."""
        if trouble:
            self._dense_until = step + _DENSE_AFTER_TROUBLE
            self.explain()
        if step <= self._dense_until or is_kept(step):
            self._writer.write(step, scalars)
            self._left_out.clear()
        else:
            self._left_out[step] = scalars

    def explain(self) -> None:
        """There is trouble: writes what was left out."""
        for step, scalars in self._left_out.items():
            self._writer.write(step, scalars)
        self._left_out.clear()

    def forget(self) -> None:
        """The run goes back, and makes these steps again."""
        self._left_out.clear()
        self._dense_until = 0
