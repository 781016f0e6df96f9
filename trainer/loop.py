"""The training loop: one class whose `run` reads from top to bottom."""

import concurrent.futures
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from data import EvalBatches, TrainBatches, open_dataset
from trainer.batches import Skipping, batch_sharding, global_batch, prefetch
from trainer.checkpoints.disk import check_workdir
from trainer.checkpoints.manager import Checkpoints, Restored, abstract_state
from trainer.config import check_batch, check_dataset
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, DivergedError, StorageError
from trainer.evaluate import Evaluation, evaluate
from trainer.goodput import Goodput
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.replicas import make_replica_check
from trainer.hosts.watchdog import Watchdog
from trainer.mesh import AXES, make_mesh
from trainer.metrics import MetricsWriter, StepLog, progress_bar
from trainer.state import TrainState, init_state, make_optimizer, model_config
from trainer.step import Batch, Request, make_eval_step, make_selection_step, make_train_step

RESULT_FILE = "result.json"
logger = logging.getLogger("trainer")


def train(
    config: ConfigDict,
    workdir: str,
    interrupt: Interrupt | None = None,
    override_resume: Sequence[str] = (),
    started_at: float | None = None,
) -> int:
    """Trains to `config.steps`, from the newest sound checkpoint in `workdir` if there is one, then evaluates.

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
    dataset = open_dataset(config.data.path)
    check_dataset(config, dataset)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(_initial_state(config))))
    check_workdir(workdir, state_bytes)
    goodput = Goodput(workdir, started_at, is_main)
    goodput.add("start_up", time.time() - started_at)
    checkpoints = Checkpoints(workdir, config, dataset.manifest.fingerprint, override_resume)
    finished = checkpoints.latest_step() == config.steps and epath.Path(workdir, RESULT_FILE).exists()
    if is_main:
        counts = model_config(config).parameter_counts()
        logger.info("mesh %s over %d devices", dict(mesh.shape), mesh.size)
        logger.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in counts.items()))

    with jax.set_mesh(mesh):
        state_shape = abstract_state(jax.eval_shape(_initial_state(config)), mesh)
        pad_id = dataset.manifest.tokenizer.pad_id
        # The checkpoint is read while the compiler works, and a mistake in the config, which shows there, is not kept
        # waiting for it.
        compiler = concurrent.futures.ThreadPoolExecutor(1, "compile")
        compile_step = functools.partial(compile_train_step, config, pad_id, state_shape, mesh)
        compiled = None if finished else compiler.submit(compile_step)
        faults = config.faults
        watchdog = Watchdog(
            faults.step_timeout_seconds,
            faults.step_timeout_factor,
            faults.first_step_timeout_seconds,
            interrupt.on_exit,
        )
        with goodput.span("restore"):
            watchdog.begin("restoring a checkpoint")
            start = checkpoints.restore(state_shape) or _fresh_start(config)
            watchdog.end()
        if finished and start.step == config.steps:  # else the last checkpoint turned out to be damaged
            logger.info("already finished: see %s/%s; for another run give another --workdir", workdir, RESULT_FILE)
            checkpoints.close()
            return EXIT_FINISHED
        compiled = compiled or compiler.submit(compile_step)
        compiler.shutdown(wait=False)
        if is_main:
            logger.info("starting at step %d of %d", start.step, config.steps)
        batch_options = {"context_length": config.context_length, "batch_size": config.batch_size}
        run = Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            state_shape=state_shape,
            compiled=compiled,
            pad_id=pad_id,
            train_batches=TrainBatches(dataset, seed=config.seed, **batch_options),
            eval_batches=EvalBatches(dataset, **batch_options),
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

    config: ConfigDict
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
        config = self.config
        self.sharding = batch_sharding(self.mesh)
        self.eval_step = jax.jit(make_eval_step(config, self.pad_id))
        self.selection_step = jax.jit(make_selection_step(config, self.pad_id))
        self.check_replicas = make_replica_check(self.state_shape.params, self.mesh)
        self.first_eval_batch = functools.partial(global_batch, self.eval_batches, 0, self.sharding)
        self.request_array = functools.cache(functools.partial(_request_array, self.mesh))
        self.rolled_back_to: int | None = None
        self.failed_saves = 0

    def run(self, start: Restored) -> int:
        """Trains and evaluates; the exit code."""
        config = self.config
        self.begin_at(start)  # batches are read while the compiler still works
        with self.goodput.span("compile"):
            self.train_step = self.compiled.result()
        self.writer = MetricsWriter(f"{self.workdir}/tensorboard", self.step + 1, enabled=self.is_main)
        self.last_save_time = time.monotonic()
        self.interrupt.can_save(config.faults.exit_seconds)
        num_eval_batches = min(config.eval.batches, self.eval_batches.num_batches)
        with progress_bar(config.steps, "train", self.is_main, initial=self.step) as bar:
            self.log = StepLog(self.writer, self.goodput, config.log_every_steps, bar, self.is_main, self.started_at)
            while True:
                # `step` updates are done. What is due here is done before the next update.
                if self.is_due(config.eval.every_steps) and self.step != self.last_eval_step:
                    self.log.drain()
                    if self.evaluate(num_eval_batches, "eval") is None:
                        return self.leave()
                    self.last_eval_step = self.step
                every = config.faults.check_replicas_every_steps
                if self.is_due(every) or (every and self.step == config.steps):
                    self.log.drain()
                    self.check_replicas(self.state.params, self.step)
                if self.is_due(config.checkpoint.every_steps):
                    self.save()
                if self.step == config.steps:
                    self.log.drain()
                if self.log.bad_steps >= config.faults.max_bad_steps:
                    self.roll_back()
                    continue
                if self.log.requests[Request.STOP]:
                    self.log.drain()
                    return self.leave()
                if self.step == config.steps:
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
            source, range(self.step, self.config.steps), self.sharding
        )

    def is_due(self, every_steps: int) -> bool:
        """Whether something that is done every so many steps is due at this one, on the way."""
        return every_steps > 0 and self.first_step < self.step < self.config.steps and self.step % every_steps == 0

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
        minutes = self.config.checkpoint.every_minutes
        overdue = minutes > 0 and time.monotonic() - self.last_save_time > 60 * minutes
        asked = {
            Request.STOP: self.interrupt.requested,
            Request.SAVE: self.is_main and overdue and saving == "idle",
            Request.SAVE_AGAIN: saving == "failed",
        }
        return self.request_array(tuple(asked.values()))

    def evaluate(self, num_batches: int, name: str) -> Evaluation | None:
        """Validation loss and what is masked, into TensorBoard; None if a host was told to stop meanwhile."""
        config = self.config
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
                if config.model.selective:
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
            start = self.checkpoints.restore(self.state_shape) or _fresh_start(self.config)
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
                "steps": self.config.steps,
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


def compile_train_step(config: ConfigDict, pad_id: int, state_shape: TrainState, mesh: Mesh) -> jax.stages.Compiled:
    """The train step compiled for exactly these shapes and shardings, its state donated."""
    shape, sharding = (config.batch_size, config.context_length), batch_sharding(mesh)
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    requests = jax.ShapeDtypeStruct((mesh.size, len(Request)), jnp.int32, sharding=_request_sharding(mesh))
    start = time.monotonic()
    with jax.set_mesh(mesh):  # of this thread
        step = jax.jit(make_train_step(config, make_optimizer(config), pad_id), donate_argnums=0)
        compiled = step.lower(state_shape, Batch(inputs=rows, targets=rows), requests).compile()
    logger.info("compiled the train step in %.1f s", time.monotonic() - start)
    return compiled


def _fresh_start(config: ConfigDict) -> Restored:
    state = jax.jit(_initial_state(config))()
    return Restored(state, 0, {"last_eval_step": -1, "skipped_batches": []})


def _initial_state(config: ConfigDict) -> Callable[[], TrainState]:
    return lambda: init_state(config, make_optimizer(config))


def _request_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, jax.P(AXES))


def _request_array(mesh: Mesh, asked: tuple[bool, ...]) -> Array:
    """int32 [devices, len(Request)], this host's rows set to `asked`: hosts may differ, which is the point."""
    row = np.array([asked], np.int32)
    shards = [jax.device_put(row, device) for device in mesh.local_devices]
    return jax.make_array_from_single_device_arrays((mesh.size, len(asked)), _request_sharding(mesh), shards)
