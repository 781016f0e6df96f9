"""Saves in the background: Orbax writes, then a thread has the checkpoint sealed, and deletes what it replaces."""

import concurrent.futures
import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable
from typing import Any, Literal

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from configs import base
from trainer.checkpoints import quirks
from trainer.checkpoints.checksums import seal_path
from trainer.checkpoints.digest import digest
from trainer.checkpoints.disk import explain, gone_message, is_gone, retried
from trainer.checkpoints.folder import Metadata, expendable, list_steps, loss_of, read_metadata, seal_checkpoint
from trainer.checkpoints.reached import write_reached
from trainer.errors import ResumeError
from trainer.hosts.gather import Gatherer
from trainer.state import TrainState

logger = logging.getLogger("trainer")

RETRY_SECONDS = 5.0  # between a failed save and its being reported, for what passes by itself
_REMOVAL_SECONDS = 10.0  # for removing what is left of it
Status = Literal["idle", "saving", "failed"]


class BackgroundSaver:
    """One save at a time into `folder`; all hosts call every method alike, but read the attributes when they like.

    Attributes:
      status: How the last save stands on this host; "failed" until the next one is started.
      saved_step: The newest complete and verified checkpoint's step, None if there is none.
      failure: What went wrong with the last save, in a line; None if it did not fail.
      failures_in_a_row: Saves that failed since the last good one.
    """

    def __init__(
        self,
        folder: epath.Path,
        settings: base.Checkpoint,
        hosts: Gatherer,
        retry_seconds: float,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        """Removes what interrupted saves left. Until `join` the thread uses `hosts` too. `retry_seconds`: how long the
        folder may be out of sight before a save. `confirm` raises an error while the folder may be another run's.
        """
        quirks.put_right()
        self.status: Status = "idle"
        self.saved_step: int | None = None
        self.failure: str | None = None
        self.failures_in_a_row = 0
        self._folder, self._settings, self._hosts = folder, settings, hosts
        self._retry_seconds, self._confirm = retry_seconds, confirm
        self._thread: threading.Thread | None = None  # finishes the last save
        self._unfinished: concurrent.futures.Future[Any] | None = None  # part of a save that exceeded its time
        self._hurry = threading.Event()  # somebody waits: no pause after a failure
        context = ocp.Context()
        # Orbax waits twice for the other hosts.
        context.async_options.timeout_secs = max(1, math.ceil(settings.timeout_seconds / 2))
        # Weights hardly shrink, and compressing takes the time and memory that training could use.
        context.array.saving.use_compression = False
        self._orbax = ocp.training.Checkpointer(
            folder, context=context, cleanup_tmp_directories=True, lightweight_initialize=True
        )

    def start(self, step: int, state: TrainState, metadata: Metadata) -> None:
        """Starts a save, after the one before has ended; nothing if `step` is `saved_step`. Errors of storage show in
        the attributes later.

        Args:
          step: Updates done.
          state: May be donated as soon as this returns.
          metadata: What is put beside the arrays, and their digest with it; its "loss" goes into the seal.

        Raises:
          ResumeError: the folder is gone.
        """
        self.join()
        if step == self.saved_step:
            return
        self.status = "saving"
        # Not only the folder, which a save that was going on when it was moved may have made again.
        known = self._folder if self.saved_step is None else self._folder / str(self.saved_step)
        mine = [(self._folder / str(step)).exists(), self._is_unfinished(), is_gone(known, self._retry_seconds)]
        there, unfinished, gone = zip(*self._hosts.gather(mine), strict=True)
        if any(gone):
            raise ResumeError(gone_message(known))
        if any(unfinished):
            self._count_failure(step, f"the save before has not ended on host {unfinished.index(True)}")
            self.status = "failed"
            return
        response = None
        if not there[0]:  # else the step is complete, and only its seal could not be written
            metadata = metadata | {"digest": digest(state)}
            try:
                with contextlib.suppress(Exception):
                    self._orbax.wait()  # Orbax raises the last save's error once more, and would then save nothing
                response = self._orbax.save_async(step, state, force=True, custom_metadata=metadata).result
            except Exception as error:
                response = functools.partial(_raise, error)  # so that it fails where all others do
        self._thread = threading.Thread(target=self._finish, args=(step, response, metadata["loss"]), name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Returns when the last save is complete, verified and what it replaces deleted, or has failed."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._hurry.set()
            thread.join()
            self._hurry.clear()

    def reload(self) -> None:
        """Has Orbax list the folder anew: after checkpoints were renamed, and before the first save beside older ones,
        whose dates it needs and has not read.
        """
        self._orbax.reload()

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        self.join()
        if not self._is_unfinished():
            with contextlib.suppress(Exception):  # once more what `failure` says
                self._orbax.wait()
            self._orbax.close()

    def _finish(self, step: int, response: Callable[[], Any] | None, loss: float | None) -> None:
        """In a thread of its own: waits for Orbax, seals, deletes what need not be kept."""
        hanging, problem = False, None
        complete = functools.partial(self._complete, step, loss) if jax.process_index() == 0 else None
        try:
            for part in (response, complete):
                outcomes = self._hosts.gather(self._outcome(part), self._part_seconds())
                hanging = any(hangs for _, hangs in outcomes)
                problem = next((problem for problem, _ in outcomes if problem is not None), None)
                if problem is not None:
                    break
        except TimeoutError as error:
            problem = str(error)
        if problem is not None:
            self._count_failure(step, problem)
            if not hanging:
                self._remove_temporary(step)
            self._hurry.wait(self._settings.timeout_seconds if hanging else RETRY_SECONDS)
            self.status = "failed"
            return
        self.saved_step, self.failure, self.failures_in_a_row = step, None, 0
        self.status = "idle"

    def _outcome(self, part: Callable[[], Any] | None) -> tuple[str | None, bool]:
        """What went wrong with a part of a save, None if nothing; and whether it still goes on, left to itself."""
        problem = None
        if part is not None:
            future = _start_thread(part)
            if concurrent.futures.wait([future], self._part_seconds()).not_done:
                problem, self._unfinished = f"not done after {self._part_seconds():.0f} s", future
            elif (error := future.exception()) is not None:
                problem = explain(error, self._folder)
        if problem is not None and jax.process_count() > 1:
            problem = f"host {jax.process_index()}: {problem}"
        return problem, self._is_unfinished()

    def _complete(self, step: int, loss: float | None) -> None:
        """Reads back what was written, seals it, and deletes the checkpoints that it makes expendable."""
        folder = self._folder / str(step)
        self._confirm()
        read_metadata(folder)
        seal_checkpoint(folder, loss)
        write_reached(self._folder.parent, step)
        losses = {step: loss_of(self._folder / str(step)) for step in list_steps(self._folder)}
        for expended in expendable(losses, self._settings):
            old = self._folder / str(expended)
            if old.is_dir():
                retried(old.rmtree)
                seal_path(old).unlink(missing_ok=True)

    def _part_seconds(self) -> float:
        """How long one part of a save may take: a little more than what Orbax is given, whose message says more."""
        return 1.1 * self._settings.timeout_seconds + 1

    def _count_failure(self, step: int, reason: str) -> None:
        self.failure = f"saving step {step} failed: {reason}"
        self.failures_in_a_row += 1
        if jax.process_index() == 0:
            logger.warning("%s (%d in a row)", self.failure, self.failures_in_a_row)

    def _remove_temporary(self, step: int) -> None:
        """What is left of a save that failed would keep a full disk full."""

        def remove() -> None:
            for path in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                path.rmtree()

        if jax.process_index() == 0:
            concurrent.futures.wait([_start_thread(remove)], _REMOVAL_SECONDS)

    def _is_unfinished(self) -> bool:
        return self._unfinished is not None and not self._unfinished.done()


def _raise(error: Exception) -> None:
    raise error


def _start_thread(action: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """A thread of its own, since storage that hangs would take the caller with it."""
    pool = concurrent.futures.ThreadPoolExecutor(1, "storage")
    future = pool.submit(action)
    pool.shutdown(wait=False)
    return future
