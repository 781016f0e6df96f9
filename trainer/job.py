"""What a run is given, checked before anything is compiled, and keeps to its end."""

import dataclasses
import logging
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from trainer.beginning import first_state
from trainer.checkpoints.disk import check_workdir
from trainer.checkpoints.manager import Checkpoints, Restored
from trainer.checks import check_batch
from trainer.goodput import Goodput, Phases
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.lease import Lease
from trainer.hosts.watchdog import Watchdog
from trainer.mesh import make_mesh
from trainer.settings import Settings
from trainer.source import Source, open_source
from trainer.state import TrainState, abstract_state

logger = logging.getLogger("trainer")


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's view of it; all hosts have the same."""

    settings: Settings
    workdir: str
    mesh: Mesh
    source: Source
    state_shape: TrainState  # ShapeDtypeStructs with shardings
    checkpoints: Checkpoints
    phases: Phases
    interrupt: Interrupt
    started_at: float  # when this process began, seconds of the monotonic clock
    is_main: bool  # whether this host speaks for all
    init_from: str = ""  # folder of an exported model whose parameters a new run begins with

    @property
    def pad_id(self) -> int:
        """The token id that does not count."""
        return self.source.pad_id

    def restore(self) -> Restored:
        """The newest whole checkpoint, or the beginning.

        Raises:
          ResumeError: as `Checkpoints.restore`.
          ConfigError: as `first_state`.
        """
        return self.checkpoints.restore(self.state_shape) or self._beginning()

    def _beginning(self) -> Restored:
        state = first_state(self.settings, self.init_from)
        if self.init_from and self.is_main:
            logger.info("beginning with the parameters of %s", self.init_from)
        return Restored(state, 0, {"last_eval_step": -1, "skipped_batches": []})


def open_job(
    settings: Settings,
    workdir: str,
    lease: Lease,
    interrupt: Interrupt,
    override_resume: Sequence[str],
    started_at: float,
    init_from: str = "",
) -> Job:
    """Checks data, mesh and workdir against the settings, and each other, and takes the workdir; see `train` for the
    arguments.

    Raises:
      ConfigError, ResumeError, StorageError, LeaseError, data.DataError: nothing was overwritten.
    """
    is_main = jax.process_index() == 0
    source = open_source(settings)
    mesh = make_mesh(settings.mesh)
    check_batch(settings, mesh.shape)
    state_shape = abstract_state(settings, mesh)
    checkpoint_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_shape))
    check_workdir(workdir, checkpoint_bytes, settings.faults.storage_retry_seconds)
    lease.take(workdir)
    goodput = Goodput(workdir, started_at, is_main)
    goodput.add("start_up", time.monotonic() - started_at)
    checkpoints = Checkpoints(workdir, settings, source.fingerprint, override_resume, lease.confirm)
    if is_main:
        counts = settings.parameter_counts()
        logger.info("mesh %s over %d devices", dict(mesh.shape), mesh.size)
        if (unused := settings.model.vocab_size - source.vocab_size) > 0:
            logger.info("the model has %s token ids that the data does not have", f"{unused:,}")
        logger.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in counts.items()))
    faults = settings.faults
    watchdog = Watchdog(
        faults.step_timeout_seconds, faults.step_timeout_factor, faults.first_step_timeout_seconds, interrupt.on_exit
    )
    phases = Phases(watchdog, goodput)
    return Job(
        settings, workdir, mesh, source, state_shape, checkpoints, phases, interrupt, started_at, is_main, init_from
    )
