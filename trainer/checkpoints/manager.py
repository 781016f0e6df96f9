"""Checkpoints: Orbax v1, asynchronous, verified, restored onto any mesh and any number of hosts.

In the workdir's folder `checkpoints`, `40/` is what Orbax wrote for step 40 and `40.checksums.json` its seal, written
once it is complete and was read back. Nothing older is deleted before that. A damaged checkpoint is renamed to
`40.damaged`, one that a rollback left behind to `40.rolled-back`; neither is ever deleted. Beside the folder,
`newest_checkpoint` says which one there must be.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath

from trainer.checkpoints.checksums import DamagedError, Seal, check_files, read_seal, write_seal
from trainer.checkpoints.disk import explain, retried_at_start
from trainer.checkpoints.folder import (
    Metadata,
    checkpoint_folder,
    list_steps,
    load_state,
    read_metadata,
    seal_checkpoint,
    set_aside,
)
from trainer.checkpoints.identity import Identity, check_override
from trainer.checkpoints.local import LocalCheckpoints
from trainer.checkpoints.reached import read_reached, write_reached
from trainer.checkpoints.saving import BackgroundSaver, Status
from trainer.errors import ResumeError, StorageError
from trainer.hosts.gather import Gatherer
from trainer.settings import Settings
from trainer.state import TrainState

logger = logging.getLogger("trainer")

DAMAGED, ROLLED_BACK = "damaged", "rolled-back"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and verified."""

    state: TrainState
    step: int
    notes: dict[str, Any]  # as given to `save`
    loss: float | None = None  # this step's validation loss, where it has one


class Checkpoints:
    """The checkpoints of one workdir.

    All hosts call every method alike, from one thread at a time, except `poll` and the properties, which are local.
    Never may another program with collectives run meanwhile; compiling may.
    """

    def __init__(
        self,
        workdir: str,
        settings: Settings,
        dataset_fingerprint: str,
        override: Iterable[str] = (),
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        """Removes what interrupted saves left; reads nothing yet.

        Args:
          workdir: A path, or a URL such as gs://bucket/run.
          settings: The run's.
          dataset_fingerprint: Of the run's dataset.
          override: Config fields in which a checkpoint may differ from `settings`, though they change the run's course.
          confirm: Raises an error while the workdir may be another run's; no checkpoint is completed then.

        Raises:
          ConfigError: `override` names a field that is unknown, or never compared.
        """
        check_override(override)
        self._override = tuple(override)
        self._identity = Identity(settings, dataset_fingerprint)
        self._folder = checkpoint_folder(workdir)
        self._retry_seconds = settings.faults.storage_retry_seconds
        self._base: int | None = None  # the workdir's newest checkpoint, where the run began at a local one
        self._hosts = Gatherer("checkpoints", settings.checkpoint.timeout_seconds)
        local_folder = settings.checkpoint.local_folder
        self._local = LocalCheckpoints(local_folder, self._folder, self._hosts) if local_folder else None
        self._saver = BackgroundSaver(self._folder, settings.checkpoint, self._hosts, self._retry_seconds, confirm)

    @property
    def saved_step(self) -> int | None:
        """The newest complete and verified checkpoint's step, None if there is none."""
        return self._saver.saved_step

    @property
    def failure(self) -> str | None:
        """What went wrong with the last save, in a line; None if it did not fail."""
        return self._saver.failure

    @property
    def failures_in_a_row(self) -> int:
        """Saves that failed since the last good one."""
        return self._saver.failures_in_a_row

    def latest_step(self) -> int | None:
        """The newest complete and verified checkpoint's step; before `restore`, the newest one's, verified or not."""
        return self.saved_step if self.saved_step is not None else max(list_steps(self._folder), default=None)

    def restore(self, abstract_state: TrainState) -> Restored | None:
        """The newest checkpoint of either tier that is whole, laid out as `abstract_state` (ShapeDtypeStructs with
        shardings); None if there never was one. Newer ones in the workdir, which are damaged, are renamed; one that is
        gone is named in a warning.

        Raises:
          ResumeError: no checkpoint is whole, or all are gone, or the newest whole one was made with another dataset,
            or with a config that computes something else.
          StorageError: storage did not give what is there, though it was tried again; nothing was renamed for that.
        """
        tried: dict[int, str] = {}
        found = retried_at_start(lambda: list_steps(self._folder), self._retry_seconds)
        reached_here = retried_at_start(lambda: read_reached(self._folder.parent), self._retry_seconds)
        steps, reached = self._hosts.from_first_host([sorted(found, reverse=True), reached_here])
        if self._local is not None and steps:
            local = self._local.restore(abstract_state, steps[0], self._check_identity)
            if local is not None:
                step, state, metadata = local
                self._base = steps[0]
                self._saver.reload()
                return Restored(state, step, metadata["notes"])
        for step in steps:
            folder = self._folder / str(step)
            try:
                seal, metadata = self._check_files(folder)
                self._check_identity(step, metadata)
                state = load_state(folder, metadata, abstract_state, sealed=seal is not None)
            except DamagedError as error:
                tried[step] = str(error)
                continue
            if reached is not None and step < reached and reached not in tried and jax.process_index() == 0:
                logger.warning("checkpoint %d, the newest there was, is gone; going back to step %d", reached, step)
            self._note_reached(step)
            self._set_aside(tried, DAMAGED)
            if seal is None:
                if jax.process_index() == 0:
                    logger.warning(
                        "checkpoint %d had no checksums, as a save that was interrupted late leaves it", step
                    )
                self._on_first_host(lambda folder=folder, metadata=metadata: seal_checkpoint(folder, metadata["loss"]))  # type: ignore[misc]
            self._saver.saved_step = step
            return Restored(state, step, metadata["notes"], seal.loss if seal else metadata["loss"])
        aside = self._hosts.from_first_host(sorted(path.name for path in self._folder.glob(f"*.{DAMAGED}*")))
        if tried or aside:
            reasons = [f"{step}: {reason}" for step, reason in tried.items()] + aside
            raise ResumeError(
                f"no checkpoint in {self._folder} is whole ({'; '.join(reasons)}); bring one back, or start anew with "
                "another --workdir"
            )
        if reached is not None:
            raise ResumeError(
                f"the checkpoints in {self._folder} are gone, up to that of step {reached}; bring them back, or start "
                "anew with another --workdir, or with this one after emptying it"
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

        Raises:
          ResumeError: the workdir is no longer where it was.
        """
        loss = loss if loss is not None and math.isfinite(loss) else None
        self._saver.start(step, state, self._identity.metadata() | {"notes": dict(notes), "loss": loss})

    def add_loss(self, step: int, loss: float) -> None:
        """Gives the checkpoint of `step`, which is `saved_step`, a validation loss that came after it."""
        folder = self._folder / str(step)

        def seal_again() -> None:
            seal = read_seal(folder)
            if seal is not None and math.isfinite(loss):
                write_seal(folder, seal._replace(loss=loss))

        for problem in self._on_first_host(seal_again):
            logger.warning("checkpoint %d does not count among the best: %s", step, problem)

    def save_locally(self, step: int, state: TrainState, notes: Mapping[str, Any]) -> None:
        """Copies each host's part of the state to its `local_folder`, in the background, after the copy before; nothing
        where there is none. It adds to what the workdir holds, and is no use without that. Arguments as `save`.
        """
        if self._local is not None:
            base = self._base if self.saved_step is None else self.saved_step
            metadata = self._identity.metadata() | {"notes": dict(notes), "loss": None}
            self._local.save(step, state, metadata, base)

    def forget_local(self) -> None:
        """Removes this host's local copies, which hold what its own devices computed."""
        if self._local is not None:
            self._local.forget()

    def poll(self) -> Status:
        """How the last save stands on this host; returns at once. "failed" until the next `save`."""
        return self._saver.status

    def wait(self) -> None:
        """Returns when the last save is complete, verified and what it replaces deleted, or has failed."""
        self._saver.join()

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads; local copies go once the workdir has the state."""
        self._saver.close()
        if self._local is not None and (self.saved_step or 0) >= (self._local.newest or 0):
            self._local.forget()

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints newer than `step`, so that the run can save these steps anew.

        Raises:
          StorageError: one cannot be renamed.
        """
        self._saver.join()
        if self._local is not None:
            self._local.forget(after=step)
        steps = self._hosts.from_first_host(sorted(list_steps(self._folder)))
        reason = f"the run goes back to step {step}"
        remaining = max((number for number in steps if number <= step), default=None)
        self._note_reached(remaining)
        self._set_aside({number: reason for number in steps if number > step}, ROLLED_BACK)
        self._saver.saved_step = remaining

    def _note_reached(self, step: int | None) -> None:
        """Before newer checkpoints are renamed: a run that is killed in between misses none."""
        problems = self._on_first_host(lambda: write_reached(self._folder.parent, step))
        if problems:
            raise StorageError(f"{self._folder.parent} cannot be written to: {problems[0]}")

    def _check_files(self, folder: epath.Path) -> tuple[Seal | None, Metadata]:
        """The checkpoint's seal and metadata. Each host reads its share of the files; all raise DamagedError or
        StorageError if one of them would.
        """
        seal, metadata, damage, refusal = None, Metadata(), None, None
        try:
            seal, metadata = retried_at_start(lambda: _read_share(folder), self._retry_seconds)
        except DamagedError as error:
            damage = str(error)
        except OSError as error:
            refusal = f"{folder} cannot be read now: {error}; it is not touched, run the same command again"
        for damages, refusals in [zip(*self._hosts.gather([damage, refusal]), strict=True)]:
            for text in filter(None, refusals):
                raise StorageError(text)
            for text in filter(None, damages):
                raise DamagedError(text)
        return seal, metadata

    def _check_identity(self, step: int, metadata: Mapping[str, Any]) -> None:
        self._identity.check(step, metadata, self._override)

    def _set_aside(self, reasons: Mapping[int, str], label: str) -> None:
        def rename() -> None:
            for step, reason in reasons.items():
                name = set_aside(self._folder / str(step), label)
                logger.warning("checkpoint %d is %s, set aside as %s: %s", step, label, name, reason)

        problems = self._on_first_host(rename)
        if problems:
            raise StorageError(f"a checkpoint in {self._folder} cannot be renamed: {problems[0]}")
        self._saver.reload()

    def _on_first_host(self, action: Callable[[], Any]) -> list[str]:
        """Has host 0 do something while the others wait; what went wrong, empty if nothing."""
        problem = None
        if jax.process_index() == 0:
            try:
                action()
            except Exception as error:
                problem = explain(error, self._folder)
        return [text for text in self._hosts.gather(problem) if text is not None]


def _read_share(folder: epath.Path) -> tuple[Seal | None, Metadata]:
    """Seal and metadata of a checkpoint, and this host's share of its files compared with the seal.

    Raises:
      DamagedError: as `read_seal`, `check_files` and `read_metadata`.
      OSError: storage does not give a file.
    """
    if not folder.stat().is_directory:  # not is_dir(), to which a refusal means no
        raise DamagedError(f"{folder} is a file")
    seal = read_seal(folder)
    if seal is None and not any(folder.iterdir()):
        raise DamagedError(f"{folder} is empty")
    if seal is not None:
        check_files(folder, seal, slice(jax.process_index(), None, jax.process_count()))
    return seal, read_metadata(folder)
