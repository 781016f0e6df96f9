"""Checkpoints: Orbax v1, asynchronous, verified, restored onto any mesh and any number of hosts.

In the workdir's folder `checkpoints`, `40/` is what Orbax wrote for step 40 and `40.checksums.json` its seal, written
once it is complete and was read back. Nothing older is deleted before that. A damaged checkpoint is renamed to
`40.damaged`, one that a rollback left behind to `40.rolled-back`; neither is ever deleted.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from trainer.checkpoints.disk import explain, retried
from trainer.checkpoints.folder import (
    checkpoint_folder,
    expendable,
    list_steps,
    load_state,
    loss_of,
    read_metadata,
    seal_checkpoint,
    set_aside,
)
from trainer.checkpoints.identity import Identity, check_override
from trainer.checkpoints.integrity import DamagedError, Seal, check_files, digest, read_seal, seal_path
from trainer.errors import ResumeError
from trainer.hosts.gather import gather
from trainer.settings import Settings
from trainer.state import TrainState

logger = logging.getLogger("trainer")

RETRY_SECONDS = 5.0  # between a failed save and its being reported, for what passes by itself
_REMOVAL_SECONDS = 10.0  # for removing what is left of it
DAMAGED, ROLLED_BACK = "damaged", "rolled-back"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and verified."""

    state: TrainState
    step: int
    notes: dict[str, Any]  # as given to `save`


class Checkpoints:
    """The checkpoints of one workdir.

    All hosts call every method alike, from one thread at a time, except `poll` and the attributes, which are local.
    Never may another program with collectives run meanwhile; compiling may.

    Attributes:
      saved_step: The newest complete and verified checkpoint's step, None if there is none.
      failure: What went wrong with the last save, in a line; None if it did not fail.
      failures_in_a_row: Saves that failed since the last good one.
    """

    def __init__(
        self, workdir: str, settings: Settings, dataset_fingerprint: str, override: Iterable[str] = ()
    ) -> None:
        """Removes what interrupted saves left; reads nothing yet.

        Args:
          workdir: A path, or a URL such as gs://bucket/run.
          settings: The run's.
          dataset_fingerprint: Of the run's dataset.
          override: Config fields in which a checkpoint may differ from `settings`, though they change the run's course.

        Raises:
          ConfigError: `override` names a field that is unknown, or never compared.
        """
        check_override(override)
        self.saved_step: int | None = None
        self.failure: str | None = None
        self.failures_in_a_row = 0
        self._override, self._config = tuple(override), settings.checkpoint
        self._identity = Identity(settings, dataset_fingerprint)
        self._folder = checkpoint_folder(workdir)
        self._status: Literal["idle", "saving", "failed"] = "idle"
        self._thread: threading.Thread | None = None  # finishes the last save
        self._unfinished: concurrent.futures.Future[Any] | None = None  # part of a save that exceeded its time
        self._hurry = threading.Event()  # somebody waits: no pause after a failure
        self._gathers = 0
        context = ocp.Context()
        # Orbax waits twice for the other hosts.
        context.async_options.timeout_secs = max(1, math.ceil(self._config.timeout_seconds / 2))
        # Weights hardly shrink, and compressing takes the time and memory that training could use.
        context.array.saving.use_compression = False
        self._orbax = ocp.training.Checkpointer(
            self._folder, context=context, cleanup_tmp_directories=True, lightweight_initialize=True
        )

    def latest_step(self) -> int | None:
        """The newest complete and verified checkpoint's step; before `restore`, the newest one's, verified or not."""
        return self.saved_step if self.saved_step is not None else max(list_steps(self._folder), default=None)

    def restore(self, abstract_state: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, laid out as `abstract_state` (ShapeDtypeStructs with shardings); None if
        there never was one. Newer ones, which are damaged, are renamed.

        Raises:
          ResumeError: no checkpoint is whole, or the newest whole one was made with another dataset, or with a config
            that computes something else.
        """
        tried: dict[int, str] = {}
        for step in self._gather(sorted(list_steps(self._folder), reverse=True))[0]:
            folder = self._folder / str(step)
            try:
                seal = self._check_files(folder)
                metadata = read_metadata(folder)
                self._identity.check(step, metadata, self._override)
                state = load_state(folder, metadata, abstract_state, sealed=seal is not None)
            except DamagedError as error:
                tried[step] = str(error)
                continue
            self._set_aside(tried, DAMAGED)
            if seal is None:
                if jax.process_index() == 0:
                    logger.warning(
                        "checkpoint %d had no checksums, as a save that was interrupted late leaves it", step
                    )
                self._on_first_host(lambda folder=folder, metadata=metadata: seal_checkpoint(folder, metadata["loss"]))  # type: ignore[misc]
            self.saved_step = step
            return Restored(state, step, metadata["notes"])
        aside = self._gather(sorted(path.name for path in self._folder.glob(f"*.{DAMAGED}*")))[0]
        if tried or aside:
            reasons = [f"{step}: {reason}" for step, reason in tried.items()] + aside
            raise ResumeError(
                f"no checkpoint in {self._folder} is whole ({'; '.join(reasons)}); bring one back, or start anew with "
                "another --workdir"
            )
        return None

    def save(self, step: int, state: TrainState, notes: Mapping[str, Any], loss: float | None) -> None:
        """Starts saving in the background; first waits for the save before. Errors of storage are left to `poll`.

        Args:
          step: Updates done. A checkpoint that `saved_step` says is there is not saved again.
          state: May be donated as soon as this returns.
          notes: Anything that JSON can hold; comes back from `restore`.
          loss: This step's validation loss, by which the best checkpoints are kept; None if it has none. One that is
            not finite counts as none.
        """
        self._join()
        if step == self.saved_step:
            return
        loss = loss if loss is not None and math.isfinite(loss) else None
        self._status = "saving"
        there, unfinished = zip(
            *self._gather([(self._folder / str(step)).exists(), self._is_unfinished()]), strict=True
        )
        if any(unfinished):
            self._count_failure(step, f"the save before has not ended on host {unfinished.index(True)}")
            self._status = "failed"
            return
        response = None
        if not there[0]:  # else the step is complete, and only its seal could not be written
            metadata = self._identity.metadata() | {"notes": dict(notes), "loss": loss, "digest": digest(state)}
            try:
                with contextlib.suppress(Exception):
                    self._orbax.wait()  # Orbax raises the last save's error once more, and would then save nothing
                response = self._orbax.save_async(step, state, force=True, custom_metadata=metadata)
            except Exception as error:
                response = _Failed(error)
        self._thread = threading.Thread(target=self._finish, args=(step, response, loss), name="checkpoint")
        self._thread.start()

    def poll(self) -> Literal["idle", "saving", "failed"]:
        """How the last save stands on this host; returns at once. "failed" until the next `save`."""
        return self._status

    def wait(self) -> None:
        """Returns when the last save is complete, verified and what it replaces deleted, or has failed."""
        self._join()

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        self._join()
        if not self._is_unfinished():
            with contextlib.suppress(Exception):  # once more what `failure` says
                self._orbax.wait()
            self._orbax.close()

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints newer than `step`, so that the run can save these steps anew.

        Raises:
          ResumeError: one cannot be renamed.
        """
        self._join()
        steps = self._gather(sorted(list_steps(self._folder)))[0]
        reason = f"the run goes back to step {step}"
        self._set_aside({number: reason for number in steps if number > step}, ROLLED_BACK)
        self.saved_step = max((number for number in steps if number <= step), default=None)

    def _finish(self, step: int, response: Any, loss: float | None) -> None:
        """In a thread of its own: waits for Orbax, seals, deletes what need not be kept."""
        folder, hanging, problem = self._folder / str(step), False, None
        complete = functools.partial(self._complete, folder, loss) if jax.process_index() == 0 else None
        try:
            for part in (response and response.result, complete):
                outcomes = self._gather(self._outcome(part), self._part_seconds())
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
            self._hurry.wait(self._config.timeout_seconds if hanging else RETRY_SECONDS)
            self._status = "failed"
            return
        self.saved_step, self.failure, self.failures_in_a_row = step, None, 0
        self._status = "idle"

    def _outcome(self, part: Callable[[], Any] | None) -> tuple[str | None, bool]:
        """What went wrong with a part of a save, None if nothing; and whether it still goes on, left to itself."""
        problem = None
        if part is not None:
            future = _start(part)
            if concurrent.futures.wait([future], self._part_seconds()).not_done:
                problem, self._unfinished = f"not done after {self._part_seconds():.0f} s", future
            elif (error := future.exception()) is not None:
                problem = explain(error, self._folder)
        if problem is not None and jax.process_count() > 1:
            problem = f"host {jax.process_index()}: {problem}"
        return problem, self._is_unfinished()

    def _complete(self, folder: epath.Path, loss: float | None) -> None:
        read_metadata(folder)
        seal_checkpoint(folder, loss)
        for step in expendable(
            {step: loss_of(self._folder / str(step)) for step in list_steps(self._folder)}, self._config
        ):
            old = self._folder / str(step)
            if old.is_dir():
                retried(old.rmtree)
                seal_path(old).unlink(missing_ok=True)

    def _part_seconds(self) -> float:
        """How long one part of a save may take: a little more than what Orbax is given, whose message says more."""
        return 1.1 * self._config.timeout_seconds + 1

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
            concurrent.futures.wait([_start(remove)], _REMOVAL_SECONDS)

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._hurry.set()
            thread.join()
            self._hurry.clear()

    def _is_unfinished(self) -> bool:
        return self._unfinished is not None and not self._unfinished.done()

    def _check_files(self, folder: epath.Path) -> Seal | None:
        """Each host reads its share of the files; all raise DamagedError if one of them would."""
        seal, problem = None, None
        try:
            if not folder.is_dir():
                raise DamagedError(f"{folder} is a file")
            seal = read_seal(folder)
            if seal is None and not any(folder.iterdir()):
                raise DamagedError(f"{folder} is empty")
            if seal is not None:
                check_files(folder, seal, slice(jax.process_index(), None, jax.process_count()))
        except DamagedError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder} cannot be read: {error}"
        for text in self._gather(problem):
            if text is not None:
                raise DamagedError(text)
        return seal

    def _set_aside(self, reasons: Mapping[int, str], label: str) -> None:
        def rename() -> None:
            for step, reason in reasons.items():
                name = set_aside(self._folder / str(step), label)
                logger.warning("checkpoint %d is %s, set aside as %s: %s", step, label, name, reason)

        problems = self._on_first_host(rename)
        if problems:
            raise ResumeError(f"a checkpoint in {self._folder} cannot be renamed: {problems[0]}")
        self._orbax.reload()

    def _on_first_host(self, action: Callable[[], Any]) -> list[str]:
        """Has host 0 do something while the others wait; what went wrong, empty if nothing."""
        problem = None
        if jax.process_index() == 0:
            try:
                action()
            except Exception as error:
                problem = explain(error, self._folder)
        return [text for text in self._gather(problem) if text is not None]

    def _gather(self, value: Any, margin: float = 0) -> list[Any]:
        self._gathers += 1
        return gather(f"checkpoints/{self._gathers}", value, self._config.timeout_seconds + margin)


class _Failed:
    """Stands for a save that could not even be started, so that it fails where all others do."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> None:
        raise self._error


def _start(action: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """In a thread of its own, since storage that hangs would take the caller with it."""
    pool = concurrent.futures.ThreadPoolExecutor(1, "storage")
    future = pool.submit(action)
    pool.shutdown(wait=False)
    return future
