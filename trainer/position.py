"""Where a run is: what a checkpoint brings back, and what every step moves on."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import NamedSharding

from trainer.batches import Batch, RemainingBatches, Rows, prefetch
from trainer.checkpoints.manager import Restored
from trainer.state import TrainState


@dataclasses.dataclass
class Position:
    """Of one process; all hosts have the same."""

    state: TrainState
    step: int  # updates done
    first_step: int  # the step that this process began at, or went back to
    batches: Iterator[tuple[Batch, float]]  # of the steps to come, each with the seconds that it took to load
    skipped: Sequence[tuple[int, int]]  # windows [start, stop) of the data order that are left out
    last_eval_step: int  # -1 before the first
    last_eval_loss: float | None = None  # of `last_eval_step`; None if it is not known

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside the state."""
        return {"last_eval_step": self.last_eval_step, "skipped_batches": self.skipped}


def begin_at(source: Rows, steps: int, sharding: NamedSharding, start: Restored) -> Position:
    """Goes on from a checkpoint, or from the beginning, up to update number `steps`; begins to read batches at once."""
    skipped = [(first, stop) for first, stop in start.notes["skipped_batches"]]
    batches = prefetch(RemainingBatches(source, skipped), range(start.step, steps), sharding)
    last_eval_step = start.notes["last_eval_step"] if start.loss is None else start.step
    return Position(start.state, start.step, start.step, batches, skipped, last_eval_step, start.loss)
