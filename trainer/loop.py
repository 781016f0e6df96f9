"""The training loop: one class whose `run` reads from top to bottom."""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from jax import Array
from jax.sharding import Mesh

from data import EvalBatches, TrainBatches, open_dataset
from trainer.batches import Batch, Skipping, batch_sharding, global_batch, prefetch
from trainer.checkpoints.disk import check_workdir
from trainer.checkpoints.manager import Checkpoints, Restored
from trainer.checks import check_batch, check_dataset
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, DivergedError, StorageError
from trainer.evaluate import Evaluation, evaluate
from trainer.goodput import Goodput
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.replicas import make_replica_check
from trainer.hosts.requests import Request, request_array
from trainer.hosts.watchdog import Watchdog
from trainer.mesh import make_mesh
from trainer.metrics import MetricsWriter, StepLog, progress_bar
from trainer.settings import Settings
from trainer.state import TrainState, abstract_state, init_state
from trainer.step import compile_train_step, make_eval_step, make_selection_step

RESULT_FILE = "result.json"
logger = logging.getLogger("trainer")


def train(
    settings: Settings,
    workdir: str,
    interrupt: Interrupt | None = None,
    override_resume: Sequence[str] = (),
    started_at: float | None = None,
) -> int:
    """Trains to `settings.steps`, from the newest sound checkpoint in `workdir` if there is one, then evaluates.

    Writes `checkpoints/`, TensorBoard events in `tensorboard/`, `goodput.json` and at the end `result.json` into
    `workdir`. `override_resume` names config fields that may differ from the checkpoint's; `started_at` is when this
    process began, in seconds since the epoch.

    Returns:
      The exit code: EXIT_FINISHED, or EXIT_PREEMPTED after an interrupt that was followed by a save.

    Raises:
      ConfigError, ResumeError, data.DataError: before any step was made; nothing was overwritten.
      StorageError, DivergedError, ReplicaError: see there; the checkpoints before stand.
    """
    started_at = started_at or time.time()
    interrupt = interrupt or Interrupt()
    is_main = jax.process_index() == 0
    dataset = open_dataset(settings.data.path)
    check_dataset(settings, dataset.manifest)
    mesh = make_mesh(settings.mesh)
    check_batch(settings, mesh.shape)
    state_shape = abstract_state(settings, mesh)
    check_workdir(workdir, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_shape)))
    goodput = Goodput(workdir, started_at, is_main)
    goodput.add("start_up", time.time() - started_at)
    checkpoints = Checkpoints(workdir, settings, dataset.manifest.fingerprint, override_resume)
    finished = checkpoints.latest_step() == settings.steps and epath.Path(workdir, RESULT_FILE).exists()
    if is_main:
        counts = settings.transformer.parameter_counts()
        logger.info("mesh %s over %d devices", dict(mesh.shape), mesh.size)
        logger.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in counts.items()))

    with jax.set_mesh(mesh):
        pad_id = dataset.manifest.tokenizer.pad_id
        # The checkpoint is read while the compiler works, and a mistake in the config, which shows there, is not kept
        # waiting for it.
        compiler = concurrent.futures.ThreadPoolExecutor(1, "compile")
        compile_step = functools.partial(compile_train_step, settings, pad_id, state_shape, mesh)
        compiled = None if finished else compiler.submit(compile_step)
        faults = settings.faults
        watchdog = Watchdog(
            faults.step_timeout_seconds,
            faults.step_timeout_factor,
            faults.first_step_timeout_seconds,
            interrupt.on_exit,
        )
        with goodput.span("restore"):
            watchdog.begin("restoring a checkpoint")
            start = checkpoints.restore(state_shape) or _fresh_start(settings)
            watchdog.end()
        if finished and start.step == settings.steps:  # else the last checkpoint turned out to be damaged
            logger.info("already finished: see %s/%s; for another run give another --workdir", workdir, RESULT_FILE)
            checkpoints.close()
            return EXIT_FINISHED
        compiled = compiled or compiler.submit(compile_step)
        compiler.shutdown(wait=False)
        if is_main:
            logger.info("starting at step %d of %d", start.step, settings.steps)
        length, rows = settings.context_length, settings.batch_size
        run = Run(
            settings=settings,
            workdir=workdir,
            mesh=mesh,
            state_shape=state_shape,
            compiled=compiled,
            pad_id=pad_id,
            train_batches=TrainBatches(dataset, context_length=length, batch_size=rows, seed=settings.seed),
            eval_batches=EvalBatches(dataset, context_length=length, batch_size=rows),
            checkpoints=checkpoints,
            goodput=goodput,
            interrupt=interrupt,
            watchdog=watchdog,
            is_main=is_main,
            started_at=started_at,
        )
        return run.run(start)


@dataclasses.dataclass
class Run:
    """One process's part of a run, from a state to the end or to an interruption; all hosts do the same."""

    settings: Settings
    workdir: str
    mesh: Mesh
    state_shape: TrainState
    compiled: concurrent.futures.Future[jax.stages.Compiled]  # the train step
    pad_id: int
    train_batches: TrainBatches
    eval_batches: EvalBatches
    checkpoints: Checkpoints
    goodput: Goodput
    interrupt: Interrupt
    watchdog: Watchdog
    is_main: bool
    started_at: float
    last_eval_step: int = -1

    def __post_init__(self) -> None:
        settings = self.settings
        self.sharding = batch_sharding(self.mesh)
        self.eval_step = jax.jit(make_eval_step(settings.transformer, self.pad_id))
        self.selection_step = jax.jit(make_selection_step(settings.transformer, settings.memory_loss.tau, self.pad_id))
        self.check_replicas = make_replica_check(self.state_shape.params, self.mesh)
        self.first_eval_batch = functools.partial(global_batch, self.eval_batches, 0, self.sharding)
        self.request_array = functools.cache(functools.partial(request_array, self.mesh))
        self.rolled_back_to: int | None = None
        self.failed_saves = 0

    def run(self, start: Restored) -> int:
        """Trains and evaluates; the exit code."""
        settings = self.settings
        self.begin_at(start)  # batches are read while the compiler still works
        with self.goodput.span("compile"):
            self.train_step = self.compiled.result()
        self.writer = MetricsWriter(f"{self.workdir}/tensorboard", self.step + 1, enabled=self.is_main)
        self.last_save_time = time.monotonic()
        self.interrupt.can_save(settings.faults.exit_seconds)
        num_eval_batches = min(settings.eval.batches, self.eval_batches.num_batches)
        with progress_bar(settings.steps, "train", self.is_main, initial=self.step) as bar:
            self.log = StepLog(self.writer, self.goodput, settings.log_every_steps, bar, self.is_main, self.started_at)
            while True:
                # `step` updates are done. What is due here is done before the next update.
                if self.is_due(settings.eval.every_steps) and self.step != self.last_eval_step:
                    self.log.drain()
                    if self.evaluate(num_eval_batches, "eval") is None:
                        return self.leave()
                    self.last_eval_step = self.step
                every = settings.faults.check_replicas_every_steps
                if self.is_due(every) or (every and self.step == settings.steps):
                    self.log.drain()
                    self.check_replicas(self.state.params, self.step)
                if self.is_due(settings.checkpoint.every_steps):
                    self.save()
                if self.step == settings.steps:
                    self.log.drain()
                if self.log.bad_steps >= settings.faults.max_bad_steps:
                    self.roll_back()
                    continue
                if self.log.requests[Request.STOP]:
                    self.log.drain()
                    return self.leave()
                if self.step == settings.steps:
                    break
                if self.log.requests[Request.SAVE] or self.log.requests[Request.SAVE_AGAIN]:
                    self.save()
                self.make_step()
        self.save_for_good()
        final = self.evaluate(self.eval_batches.num_batches, "final")
        if final is None:
            return self.leave()
        self.finish(final)
        return EXIT_FINISHED

    def begin_at(self, start: Restored) -> None:
        """Goes on from a checkpoint, or from the beginning."""
        self.state, self.step, self.first_step = start.state, start.step, start.step
        self.last_eval_step = start.notes["last_eval_step"]
        self.last_eval_loss: float | None = None
        self.skipped: list[tuple[int, int]] = [(first, stop) for first, stop in start.notes["skipped_batches"]]
        source = Skipping(self.train_batches, self.skipped)
        self.batches: Iterator[tuple[Batch, float]] = prefetch(
            source, range(self.step, self.settings.steps), self.sharding
        )

    def is_due(self, every_steps: int) -> bool:
        """Whether something that is done every so many steps is due at this one, on the way."""
        return every_steps > 0 and self.first_step < self.step < self.settings.steps and self.step % every_steps == 0

    def make_step(self) -> None:
        """Dispatches the next update, then reads what the one before computed."""
        self.watchdog.begin("a training step")
        self.log.begin()
        start = time.monotonic()
        batch, loading_seconds = next(self.batches)
        waited = time.monotonic() - start
        self.state, metrics = self.train_step(self.state, batch, self.requests())
        self.step += 1
        self.log.add(self.step, metrics, {"loading_seconds": loading_seconds, "wait_seconds": waited})
        self.watchdog.end()

    def requests(self) -> Array:
        """What this host asks of all, for the next step."""
        saving = self.checkpoints.poll()
        if self.checkpoints.failures_in_a_row >= 2:
            raise StorageError(f"two checkpoints in a row could not be saved: {self.checkpoints.failure}")
        minutes = self.settings.checkpoint.every_minutes
        overdue = minutes > 0 and time.monotonic() - self.last_save_time > 60 * minutes
        asked = {
            Request.STOP: self.interrupt.requested,
            Request.SAVE: self.is_main and overdue and saving == "idle",
            Request.SAVE_AGAIN: saving == "failed",
        }
        return self.request_array(tuple(asked.values()))

    def evaluate(self, num_batches: int, name: str) -> Evaluation | None:
        """Validation loss and what is masked, into TensorBoard; None if a host was told to stop meanwhile."""
        settings = self.settings
        with self.goodput.span("evaluation"), progress_bar(num_batches, name, self.is_main) as bar:

            def on_batch() -> None:
                self.watchdog.begin("an evaluation batch")
                bar.update()

            self.watchdog.begin("an evaluation batch")
            params = self.state.params
            result = evaluate(
                self.eval_step, params, self.eval_batches, num_batches, self.sharding, self.requests, on_batch
            )
            self.watchdog.begin("the selection's statistics")
            if result is not None:
                self.last_eval_loss = result.loss
                self.writer.write(self.step, {f"{name}/loss": result.loss, f"{name}/perplexity": result.perplexity})
                if settings.model.selective:
                    statistics = jax.device_get(self.selection_step(params, self.first_eval_batch()))
                    for statistic, value_L in statistics.items():
                        layers = {f"{statistic}/layer_{n:02d}": float(value) for n, value in enumerate(value_L)}
                        self.writer.write(self.step, layers)
            self.watchdog.end()
        return result

    def save(self) -> None:
        """Starts a checkpoint of this step; once more after a failed one."""
        self.log.drain()
        self.failed_saves += bool(self.log.requests[Request.SAVE_AGAIN])
        self.log.requests[Request.SAVE] = self.log.requests[Request.SAVE_AGAIN] = 0
        self.writer.flush()
        notes = {"last_eval_step": self.last_eval_step, "skipped_batches": self.skipped}
        loss = self.last_eval_loss if self.last_eval_step == self.step else None
        start = time.monotonic()
        self.watchdog.begin("saving a checkpoint")
        with self.goodput.span("saving"):
            self.checkpoints.save(self.step, self.state, notes, loss)
        self.watchdog.end()
        self.last_save_time = time.monotonic()
        scalars = {"checkpoint/stall_seconds": self.last_save_time - start, "checkpoint/failures": self.failed_saves}
        self.writer.write(self.step, scalars | self.goodput.scalars())

    def save_for_good(self) -> None:
        """Returns when there is a sound checkpoint of this step; tries twice."""
        for _ in range(2):
            if self.checkpoints.saved_step != self.step:
                self.save()
            self.watchdog.begin("waiting for a checkpoint")
            with self.goodput.span("saving"):
                self.checkpoints.wait()
            self.watchdog.end()
            if self.checkpoints.saved_step == self.step:
                return
        raise StorageError(f"step {self.step} could not be saved: {self.checkpoints.failure}")

    def roll_back(self) -> None:
        """Goes back to the checkpoint before the bad steps, and leaves their batches out."""
        last = self.log.last_step
        first = last - self.log.bad_steps  # updates before the first bad one
        self.log.drain()
        source = Skipping(self.train_batches, self.skipped)
        window = (source.index(first), source.index(last - 1) + 1)
        batches = f"batches {window[0]} to {window[1] - 1} of the data order"
        described = f"steps {first + 1} to {last}, {batches}"
        self.watchdog.begin("rolling back")
        self.checkpoints.wait()
        self.checkpoints.set_aside_after(first)
        del self.state, self.batches  # two states may not fit
        with self.goodput.span("restore"):
            start = self.checkpoints.restore(self.state_shape) or _fresh_start(self.settings)
        self.watchdog.end()
        if start.step == self.rolled_back_to:
            raise DivergedError(
                f"loss or gradient was bad in {described}, although the run had just been rolled back to step "
                f"{start.step} and had left out batches {', '.join(f'{a} to {b - 1}' for a, b in self.skipped)}. "
                "A lower learning rate, clipping, or the loss at these steps in TensorBoard are what to look at"
            )
        logger.warning("bad numbers in %s; back to step %d, without these batches", described, start.step)
        self.rolled_back_to = start.step
        covered = [w for w in self.skipped if window[0] <= w[0] and w[1] <= window[1]]
        skipped = sorted([*(w for w in self.skipped if w not in covered), window])
        self.begin_at(dataclasses.replace(start, notes=start.notes | {"skipped_batches": skipped}))
        self.writer.withdraw(self.step + 1)
        self.log.forget()

    def leave(self) -> int:
        """Saves and closes after an interruption; the exit code."""
        self.save_for_good()
        self.close()
        if self.is_main:
            logger.info("interrupted and saved at step %d; run the same command to continue", self.step)
        return EXIT_PREEMPTED

    def finish(self, final: Evaluation) -> None:
        """Writes the result and closes."""
        self.close()
        if self.is_main:
            result = {
                "steps": self.settings.steps,
                "loss": final.loss,
                "perplexity": final.perplexity,
                "tokens": final.tokens,
            }
            epath.Path(self.workdir, RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n")
            logger.info("finished: validation perplexity %.3f over %d tokens", final.perplexity, final.tokens)

    def close(self) -> None:
        """Closes what is open, and says where the time went."""
        self.checkpoints.close()
        self.writer.write(self.step, self.goodput.scalars())
        self.writer.close()
        self.goodput.write()
        if self.is_main:
            logger.info("%s", self.goodput.summary())


def _fresh_start(settings: Settings) -> Restored:
    state = jax.jit(lambda: init_state(settings))()
    return Restored(state, 0, {"last_eval_step": -1, "skipped_batches": []})
