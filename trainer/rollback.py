"""Back to before a row of bad steps, and on without their batches."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from trainer.batches import RemainingBatches, Rows
from trainer.checkpoints.manager import Checkpoints, Restored
from trainer.errors import DivergedError

logger = logging.getLogger("trainer")


@dataclasses.dataclass
class Rollback:
    """Rolls one run back, but not twice to the same step."""

    checkpoints: Checkpoints
    restore: Callable[[], Restored]  # the newest checkpoint, or the beginning
    train_batches: Rows
    last_target: int | None = None  # the step that the last one went back to

    def __call__(self, first: int, last: int, skipped: Sequence[tuple[int, int]]) -> Restored:
        """Where to go on, after the updates number `first` + 1 to `last` were bad; its notes leave out their batches
        too.

        Args:
          first: Updates before the first bad one.
          last: The newest bad update.
          skipped: Windows [start, stop) of the data order that were left out so far.

        Raises:
          DivergedError: the run was rolled back to this very step before.
        """
        source = RemainingBatches(self.train_batches, skipped)
        window = (source.index(first), source.index(last - 1) + 1)
        described = f"steps {first + 1} to {last}, batches {window[0]} to {window[1] - 1} of the data order"
        self.checkpoints.wait()
        self.checkpoints.set_aside_after(first)
        start = self.restore()
        if start.step == self.last_target:
            raise DivergedError(
                f"loss or gradient was bad in {described}, although the run had just been rolled back to step "
                f"{start.step} and had left out batches {', '.join(f'{a} to {b - 1}' for a, b in skipped)}. "
                "A lower learning rate, clipping, or the loss at these steps in TensorBoard are what to look at"
            )
        logger.warning("bad numbers in %s; back to step %d, without these batches", described, start.step)
        self.last_target = start.step
        apart = [w for w in skipped if not (window[0] <= w[0] and w[1] <= window[1])]
        return dataclasses.replace(start, notes=start.notes | {"skipped_batches": sorted([*apart, window])})
