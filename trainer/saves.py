"""When a run saves, and what each host asks of the others for it."""

import functools
import time

import jax
from jax import Array

from trainer.errors import StorageError
from trainer.hosts.requests import Request, request_array
from trainer.job import Job
from trainer.metrics.profile import Profiler
from trainer.metrics.writer import MetricsWriter
from trainer.outcomes import Outcomes
from trainer.position import Position


class Saves:
    """The saves of one run: what asks for them, by the clock or after a failure, and what they take and leave.

    Attributes:
      last_time: When the last one was started, or else the run, seconds of the monotonic clock.
    """

    def __init__(self, job: Job, outcomes: Outcomes, writer: MetricsWriter, profiler: Profiler) -> None:
        self._checkpoints, self._phases, self._interrupt = job.checkpoints, job.phases, job.interrupt
        settings = job.settings.checkpoint
        self._every_minutes, self._is_main = settings.every_minutes, job.is_main
        self.local_every_steps = settings.local_every_steps if settings.local_folder else 0
        self._outcomes, self._writer, self._profiler = outcomes, writer, profiler
        self._request_array = functools.cache(functools.partial(request_array, job.mesh))
        self._failed = 0  # saves
        self.last_time = time.monotonic()

    def requests(self) -> Array:
        """What this host asks of all, for the next step.

        Raises:
          StorageError: two checkpoints in a row could not be saved.
        """
        saving = self._checkpoints.poll()
        if self._checkpoints.failures_in_a_row >= 2:
            raise StorageError(f"two checkpoints in a row could not be saved: {self._checkpoints.failure}")
        overdue = 0 < 60 * self._every_minutes < time.monotonic() - self.last_time
        asked = {
            Request.STOP: self._interrupt.requested,
            Request.SAVE: self._is_main and overdue and saving == "idle",
            Request.SAVE_AGAIN: saving == "failed",
            Request.PROFILE: self._profiler.asked,
        }
        return self._request_array(tuple(asked.values()))

    def save(self, at: Position) -> None:
        """Starts a checkpoint, which answers all requests for one."""
        self._outcomes.drain()
        self._failed += Request.SAVE_AGAIN in self._outcomes.requests
        self._outcomes.requests -= {Request.SAVE, Request.SAVE_AGAIN}
        loss = at.last_eval_loss if at.last_eval_step == at.step else None
        # What Orbax copies to the host, and how, is its own.
        with self._phases("saving a checkpoint", "saving"), jax.transfer_guard("allow"):
            self._writer.flush()
            start = time.monotonic()
            self._checkpoints.save(at.step, at.state, at.notes(), loss)
        self.last_time = time.monotonic()
        scalars = {"system/save_stall_seconds": self.last_time - start, "system/save_failures": self._failed}
        self._writer.write(at.step, scalars | self._phases.goodput.scalars())

    def add_loss(self, at: Position) -> None:
        """This step was evaluated after its checkpoint was made: a run that was stopped in the evaluation makes it when
        it goes on. The checkpoint shall count among the best all the same.
        """
        if self._checkpoints.saved_step == at.step and at.last_eval_loss is not None:
            with self._phases("sealing a checkpoint", "saving"):
                self._writer.flush()  # the seal says that the evaluation need not be made again
                self._checkpoints.add_loss(at.step, at.last_eval_loss)

    def save_locally(self, at: Position) -> None:
        """Starts a copy on the hosts' own storage. It adds to one in the workdir, which a new run makes first."""
        if at.first_step == 0 and at.step == self.local_every_steps:
            self.save(at)
            return
        self._outcomes.drain()
        start = time.monotonic()
        with self._phases("saving on the hosts", "saving"), jax.transfer_guard("allow"):
            self._writer.flush()
            self._checkpoints.save_locally(at.step, at.state, at.notes())
        self._writer.write(at.step, {"checkpoint/local_stall_seconds": time.monotonic() - start})

    def save_for_good(self, at: Position) -> None:
        """Returns when there is a sound checkpoint of this step; tries twice.

        Raises:
          StorageError: there is none.
        """
        for _ in range(2):
            if self._checkpoints.saved_step != at.step:
                self.save(at)
            with self._phases("waiting for a checkpoint", "saving"):
                self._checkpoints.wait()
            if self._checkpoints.saved_step == at.step:
                return
        raise StorageError(f"step {at.step} could not be saved: {self._checkpoints.failure}")
