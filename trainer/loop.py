"""The training loop: `train` sets a run up, `Run.run` reads from top to bottom."""

import concurrent.futures
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath

from trainer.batches import batch_sharding
from trainer.checkpoints.disk import explain, gone_message, retried, write_file
from trainer.checkpoints.manager import Restored
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, ReplicaError, ResumeError, StorageError
from trainer.evaluate import Evaluation
from trainer.hosts.interrupt import Interrupt
from trainer.hosts.lease import Lease
from trainer.hosts.replicas import make_replica_check
from trainer.hosts.requests import Request
from trainer.job import Job, open_job
from trainer.metrics.norms import state_norms
from trainer.metrics.profile import Profiler
from trainer.metrics.run import open_metrics
from trainer.metrics.steps import StepLog
from trainer.metrics.terminal import progress_bar
from trainer.metrics.thinning import is_kept
from trainer.metrics.writer import MetricsWriter
from trainer.outcomes import NORMS_EVERY, Outcomes
from trainer.position import Position, begin_at
from trainer.rollback import Rollback
from trainer.saves import Saves
from trainer.settings import Settings
from trainer.step import compile_train_step
from trainer.validation import Validation

RESULT_FILE = "result.json"
logger = logging.getLogger("trainer")


def train(
    settings: Settings,
    workdir: str,
    interrupt: Interrupt | None = None,
    override_resume: Sequence[str] = (),
    started_at: float | None = None,
    writers: Sequence[MetricsWriter] = (),
    profile_steps: range = range(0),
    init_from: str = "",
) -> int:
    """Trains to `settings.steps`, from the newest sound checkpoint in `workdir` if there is one, then evaluates.

    Writes `checkpoints/`, TensorBoard events in `tensorboard/`, `metrics.jsonl`, `goodput.json` and at the end
    `result.json` into `workdir`. `override_resume` names config fields that may differ from the checkpoint's;
    `started_at` is when this process began, in seconds of the monotonic clock; `writers` get the run's metrics too, and
    `profile_steps` are traced. A new run begins with the parameters of the exported model in `init_from`, if one is
    given.

    Returns:
      The exit code: EXIT_FINISHED, or EXIT_PREEMPTED after an interrupt that was followed by a save.

    Raises:
      ConfigError, ResumeError, LeaseError, data.DataError: before any step was made; nothing was overwritten.
      StorageError, DivergedError, ReplicaError: see there; the checkpoints before stand.
    """
    interrupt = interrupt or Interrupt()
    with Lease(interrupt.on_exit) as lease:
        started_at = started_at or time.monotonic()
        job = open_job(settings, workdir, lease, interrupt, override_resume, started_at, init_from)
        return _start(job, writers, Profiler(workdir, profile_steps, job.is_main))


def _start(job: Job, writers: Sequence[MetricsWriter], profiler: Profiler) -> int:
    settings, workdir = job.settings, job.workdir
    finished = job.checkpoints.latest_step() == settings.steps and has_result(workdir)
    with jax.set_mesh(job.mesh), job.phases("work outside of steps"):
        # The checkpoint is read while the compiler works, and a mistake in the config, which shows there, is not kept
        # waiting for it.
        compiler = concurrent.futures.ThreadPoolExecutor(1, "compile")
        compile_step = functools.partial(compile_train_step, settings, job.pad_id, job.state_shape, job.mesh)
        compiled = None if finished else compiler.submit(compile_step)
        with job.phases("restoring a checkpoint", "restore"):
            start = job.restore()
        if finished and start.step == settings.steps:  # else the last checkpoint turned out to be damaged
            logger.info("already finished: see %s/%s; for another run give another --workdir", workdir, RESULT_FILE)
            job.checkpoints.close()
            return EXIT_FINISHED
        if job.is_main:
            logger.info("starting at step %d of %d", start.step, settings.steps)
        run = Run(job, start, compiled or compiler.submit(compile_step), writers, profiler)
        compiler.shutdown(wait=False)
        with jax.transfer_guard("disallow"):  # a copy to or from the devices that nobody meant would keep them waiting
            return run.run()


def has_result(workdir: str) -> bool:
    """Whether the run's result is there; one that cannot be read is not."""
    try:
        result = json.loads(epath.Path(workdir, RESULT_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and "loss" in result


class Run:
    """One process's part of a run, from a state to the end or to an interruption; all hosts do the same.

    `at` is where it is; all else is given, or remembers what is its own.
    """

    def __init__(
        self,
        job: Job,
        start: Restored,
        compiled: concurrent.futures.Future[jax.stages.Compiled],
        writers: Sequence[MetricsWriter],
        profiler: Profiler,
    ) -> None:
        """`compiled` is the train step; `writers` as in `train`."""
        settings, sharding = job.settings, batch_sharding(job.mesh)
        self.job, self.settings, self.phases = job, settings, job.phases
        source = job.source.train
        self.begin_at: Callable[[Restored], Position] = functools.partial(begin_at, source, settings.steps, sharding)
        self.at = self.begin_at(start)  # batches are read while the compiler still works
        with self.phases("waiting for the compiler", "compile"):
            self.train_step = compiled.result()
        self.writer = open_metrics(job, start.step + 1, writers)
        self.bar = progress_bar(settings.steps, "train", job.is_main, initial=start.step)
        self.log = StepLog(job, self.writer, self.bar, lambda: self.saves.last_time)
        self.outcomes = Outcomes(self.log.write, job.phases)
        self.profiler = profiler
        self.saves = Saves(job, self.outcomes, self.writer, profiler)
        self.validate = Validation(job, self.writer, self.saves.requests)
        self.check_replicas = make_replica_check(job.state_shape.params, job.mesh)
        self.state_norms = jax.jit(functools.partial(state_norms, settings))
        self.rollback = Rollback(job.checkpoints, job.restore, source)

    def run(self) -> int:
        """Trains and evaluates; the exit code."""
        self.job.interrupt.can_save(self.settings.faults.exit_seconds)
        try:
            return self.train_and_evaluate()
        except BaseException as error:
            self.log.explain(self.at.step, error)
            raise

    def train_and_evaluate(self) -> int:
        """As `run`, where nothing fails."""
        with self.bar:
            try:
                trained = self.make_steps()
            finally:
                self.profiler.stop()
        if not trained:
            return self.leave()
        self.saves.save_for_good(self.at)
        final = self.validate("final", self.at.step, self.at.state.params)
        if final is None:
            return self.leave()
        self.close()
        self.write_result(final)
        return EXIT_FINISHED

    def make_steps(self) -> bool:
        """Makes all steps, and between them what is due; False if a host was told to stop."""
        settings, outcomes = self.settings, self.outcomes
        while True:
            # `at.step` updates are done. What is due here is done before the next update.
            at, is_last = self.at, self.at.step == settings.steps
            if self.is_evaluation_due():
                outcomes.drain()
                evaluation = self.validate("eval", at.step, at.state.params, settings.eval.batches)
                if evaluation is None:
                    return False
                at.last_eval_step, at.last_eval_loss = at.step, evaluation.loss
                self.saves.add_loss(at)
            every = settings.faults.check_replicas_every_steps
            if self.is_due(every) or (every and is_last):
                outcomes.drain()
                with self.phases("comparing the replicas"):
                    self.compare_replicas()
            if self.is_due(settings.checkpoint.every_steps):
                self.saves.save(at)
            elif self.is_due(self.saves.local_every_steps):
                self.saves.save_locally(at)
            if is_last:
                outcomes.drain()
            if outcomes.bad_steps >= settings.faults.max_bad_steps:
                self.roll_back()
                continue
            if Request.STOP in outcomes.requests:
                outcomes.drain()
                return False
            if is_last:
                return True
            if outcomes.requests & {Request.SAVE, Request.SAVE_AGAIN}:
                self.saves.save(at)
            self.profiler.before_step(at.step + 1, outcomes)
            self.make_step()

    def compare_replicas(self) -> None:
        """Raises ReplicaError if a chip has computed something else; what hosts have copied of it goes too."""
        try:
            self.check_replicas(self.at.state.params, self.at.step)
        except ReplicaError:
            self.job.checkpoints.forget_local()
            raise

    def is_due(self, every_steps: int) -> bool:
        """Whether something that is done every so many steps is due at this one, on the way."""
        step = self.at.step
        return every_steps > 0 and self.at.first_step < step < self.settings.steps and step % every_steps == 0

    def is_evaluation_due(self) -> bool:
        """Whether this step's evaluation is to be made; also where a run goes on, if it was stopped in the middle."""
        at, every = self.at, self.settings.eval.every_steps
        return 0 < at.step < self.settings.steps and at.step % every == 0 and at.step != at.last_eval_step

    def make_step(self) -> None:
        """Dispatches the next update, then reads what the one before computed."""
        at = self.at
        with self.phases("a training step"):
            self.outcomes.begin_step()
            start = time.monotonic()
            batch, loading_seconds = next(at.batches)
            waited = time.monotonic() - start
            at.state, metrics = self.train_step(at.state, batch, self.saves.requests())
            at.step += 1
            if is_kept(at.step, NORMS_EVERY):
                metrics["norms"] |= self.state_norms(at.state)
            self.outcomes.add(at.step, metrics, loading_seconds, waited)

    def roll_back(self) -> None:
        """Goes back to the checkpoint before the bad steps, and leaves their batches out."""
        last = self.outcomes.last_step
        first = last - self.outcomes.bad_steps
        self.outcomes.drain()
        del self.at.state, self.at.batches  # two states may not fit
        with self.phases("rolling back", "restore"), jax.transfer_guard("allow"):  # Orbax's own
            start = self.rollback(first, last, self.at.skipped)
        self.at = self.begin_at(start)
        self.writer.withdraw(self.at.step + 1)
        self.log.forget()
        self.outcomes.forget()

    def leave(self) -> int:
        """Saves and closes after an interruption; the exit code."""
        self.saves.save_for_good(self.at)
        self.close()
        if self.job.is_main:
            logger.info("interrupted and saved at step %d; run the same command to continue", self.at.step)
        return EXIT_PREEMPTED

    def close(self) -> None:
        """Closes what is open, and says where the time went."""
        goodput = self.phases.goodput
        with self.phases("closing"):
            self.job.checkpoints.close()
            self.writer.write(self.at.step, goodput.scalars())
            self.writer.close()
            goodput.write()
        if self.job.is_main:
            logger.info("%s", goodput.summary())

    def write_result(self, final: Evaluation) -> None:
        """The run is finished."""
        if self.job.is_main:
            result = {
                "steps": self.settings.steps,
                **final.figures(),
                "perplexity": final.perplexity if math.isfinite(final.perplexity) else None,  # JSON knows no infinity
                "tokens": final.tokens,
            }
            path = epath.Path(self.job.workdir, RESULT_FILE)
            try:
                retried(lambda: write_file(path, json.dumps(result, indent=2) + "\n"))
            except FileNotFoundError as error:
                raise ResumeError(gone_message(path.parent)) from error
            except OSError as error:
                why = explain(error, path.parent)
                raise StorageError(f"{path} cannot be written: {why}. The same command computes it again") from error
            logger.info("finished: validation perplexity %.3f over %d tokens", final.perplexity, final.tokens)
