"""What a person at the terminal sees: a bar, or lines in a file."""

import logging
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

logger = logging.getLogger("trainer")


class Progress:
    """Of the training steps: on the bar, or every so many steps in a line. Of the first host alone."""

    def __init__(self, bar: tqdm, every_steps: int, last_save: Callable[[], float]) -> None:
        """`last_save`: as `StepLog`."""
        self._bar, self._every_steps, self._last_save = bar, every_steps, last_save

    def show(self, step: int, loss: float, speeds: Mapping[str, float]) -> None:
        """After each step; `speeds` are the scalars of `StepLog`."""
        in_lines = bool(self._bar.disable)
        if in_lines and step % self._every_steps:
            return
        saved = f"saved {duration(time.monotonic() - self._last_save())} ago"
        speed = f"{speeds['run/tokens_per_second']:,.0f} tokens/s, MFU {_share(speeds.get('run/mfu'))}"
        if in_lines:
            seconds = speeds["run/step_seconds_median"]
            left = duration((self._bar.total - step) * seconds)
            logger.info("step %d loss %.4f, %.2f s a step, %s, %s left, %s", step, loss, seconds, speed, left, saved)
        else:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}, {saved}", refresh=False)
            self._bar.update(step - self._bar.n)  # which draws it a few times a second


def progress_bar(total: int, description: str, is_main: bool, initial: int = 0) -> tqdm:
    """On a terminal a bar; in a file nothing (None: only there), since lines are easier to read there."""
    return tqdm(total=total, initial=initial, desc=description, unit="step", disable=None if is_main else True)


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.4 h or 2.5 days."""
    for unit, length in (("days", 86_400.0), ("h", 3_600.0)):
        if seconds >= 2 * length or (unit == "h" and seconds >= length):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
