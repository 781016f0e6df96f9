"""The training loop: one function that reads from top to bottom."""

import functools
import json
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from data import EvalBatches, TrainBatches, open_dataset
from trainer.batches import batch_sharding, global_batch, prefetch
from trainer.checkpoint import Checkpoints, abstract_state
from trainer.config import check_batch, check_dataset
from trainer.evaluate import Evaluation, evaluate
from trainer.interrupt import EXIT_PREEMPTED, Interrupt
from trainer.mesh import AXES, make_mesh
from trainer.metrics import MetricsWriter
from trainer.state import TrainState, init_state, make_optimizer, model_config
from trainer.step import Batch, make_eval_step, make_selection_step, make_train_step
from trainer.storage import check_workdir

EXIT_FINISHED = 0
RESULT_FILE = "result.json"
logger = logging.getLogger("trainer")


def train(config: ConfigDict, workdir: str, interrupt: Interrupt | None = None) -> int:
    """Trains to `config.steps`, from the newest checkpoint in `workdir` if there is one, then evaluates.

    Writes `checkpoints/`, TensorBoard events in `tensorboard/` and at the end `result.json` into `workdir`.

    Returns:
      The exit code: EXIT_FINISHED, or EXIT_PREEMPTED after an interrupt that was followed by a save.

    Raises:
      ConfigError, ResumeError, data.DataError: before any step was made; nothing was overwritten.
    """
    interrupt = interrupt or Interrupt()
    is_main = jax.process_index() == 0
    dataset = open_dataset(config.data.path)
    check_dataset(config, dataset)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    train_batches = TrainBatches(
        dataset, context_length=config.context_length, batch_size=config.batch_size, seed=config.seed
    )
    eval_batches = EvalBatches(dataset, context_length=config.context_length, batch_size=config.batch_size)
    check_workdir(workdir)
    checkpoints = Checkpoints(workdir, config, dataset.manifest.fingerprint)
    if is_main:
        counts = model_config(config).parameter_counts()
        logger.info("mesh %s over %d devices", dict(mesh.shape), mesh.size)
        logger.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in counts.items()))

    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state_shape = abstract_state(jax.eval_shape(lambda: init_state(config, optimizer)), mesh)
        restored = checkpoints.restore(state_shape)
        if restored is None:
            state, last_eval_step = jax.jit(lambda: init_state(config, optimizer))(), -1
        else:
            state, last_eval_step = restored.state, int(restored.notes["last_eval_step"])
        first_step = int(state.step)
        if first_step == config.steps and epath.Path(workdir, RESULT_FILE).exists():
            logger.info("already finished: see %s/%s; for another run give another --workdir", workdir, RESULT_FILE)
            checkpoints.close()
            return EXIT_FINISHED
        if is_main:
            logger.info("starting at step %d of %d", first_step, config.steps)

        sharding = batch_sharding(mesh)
        pad_id = dataset.manifest.tokenizer.pad_id
        train_step = compile_train_step(config, pad_id, state_shape, mesh)
        eval_step = jax.jit(make_eval_step(config, pad_id))
        selection_step = jax.jit(make_selection_step(config, pad_id))
        first_eval_batch = functools.partial(global_batch, eval_batches, 0, sharding)
        stop_values = {flag: _stop_array(mesh, flag) for flag in (False, True)}
        writer = MetricsWriter(f"{workdir}/tensorboard", first_step + 1, enabled=is_main)
        interrupt.can_save()

        def stop() -> Array:
            return stop_values[interrupt.requested]

        def evaluate_at(step: int, num_batches: int, description: str) -> Evaluation | None:
            with _progress(num_batches, description, is_main) as bar:
                result = evaluate(eval_step, state.params, eval_batches, num_batches, sharding, stop, bar.update)
            if result is not None:
                writer.write(step, {f"{description}/loss": result.loss, f"{description}/perplexity": result.perplexity})
                if config.model.selective:
                    statistics = jax.device_get(selection_step(state.params, first_eval_batch()))
                    for name, value_L in statistics.items():
                        layers = enumerate(value_L)
                        writer.write(step, {f"{name}/layer_{layer:02d}": float(value) for layer, value in layers})
            return result

        def leave(step: int) -> int:
            if checkpoints.latest_step() != step:
                checkpoints.save(step, state, {"last_eval_step": last_eval_step}, None)
            checkpoints.close()
            writer.close()
            if is_main:
                logger.info("interrupted and saved at step %d; run the same command to continue", step)
            return EXIT_PREEMPTED

        def eval_is_due(step: int) -> bool:
            return 0 < step < config.steps and step % config.eval.every_steps == 0 and last_eval_step != step

        log = StepLog(writer, config.log_every_steps, is_main)
        num_eval_batches = min(config.eval.batches, eval_batches.num_batches)
        steps = range(first_step, config.steps)
        batches = prefetch(train_batches, steps, sharding)
        with _progress(config.steps, "train", is_main, initial=first_step) as bar:
            for step in range(first_step, config.steps + 1):
                # `step` updates are done. What is due here is done before the next update.
                if eval_is_due(step):
                    log.drain()
                    if evaluate_at(step, num_eval_batches, "eval") is None:
                        return leave(step)
                    last_eval_step = step
                due = step % config.checkpoint.every_steps == 0 or step == config.steps
                if due and step > first_step:
                    log.drain()
                    writer.flush()
                    checkpoints.save(step, state, {"last_eval_step": last_eval_step}, None)
                if step == config.steps:
                    break
                start = time.monotonic()
                batch, loading_seconds = next(batches)
                host_metrics = {"loading_seconds": loading_seconds, "wait_seconds": time.monotonic() - start}
                state, metrics = train_step(state, batch, stop())
                # Reads what step - 1 computed, now that the devices have this step to work on.
                log.add(step + 1, metrics, host_metrics, bar)
                if log.stop_seen:
                    log.drain()
                    return leave(step + 1)
        log.drain()
        checkpoints.wait()
        final = evaluate_at(config.steps, eval_batches.num_batches, "final")
        if final is None:
            return leave(config.steps)
        checkpoints.close()
        writer.close()
        if is_main:
            result = {"steps": config.steps, "loss": final.loss, "perplexity": final.perplexity, "tokens": final.tokens}
            epath.Path(workdir, RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n")
            logger.info("finished: validation perplexity %.3f over %d tokens", final.perplexity, final.tokens)
    return EXIT_FINISHED


class StepLog:
    """Metrics of steps, read one step late so that reading never keeps the devices waiting."""

    def __init__(self, writer: MetricsWriter, every_steps: int, is_main: bool) -> None:
        self.stop_seen = False
        self._writer, self._every_steps, self._is_main = writer, every_steps, is_main
        self._pending: tuple[int, dict[str, Array], dict[str, float]] | None = None
        self._bar: tqdm | None = None
        self._last_time: float | None = None

    def add(self, step: int, metrics: dict[str, Array], data_seconds: dict[str, float], bar: tqdm) -> None:
        """Takes the metrics of a step just dispatched, and how its data came; writes those of the step before."""
        self._bar = bar
        self._write()
        self._pending = step, metrics, data_seconds

    def drain(self) -> None:
        """Waits for the last step dispatched and writes its metrics; the pause that follows is not counted as step
        time.
        """
        self._write()
        self._last_time = None

    def _write(self) -> None:
        if self._pending is None:
            return
        (step, metrics, data_seconds), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.stop_seen = self.stop_seen or bool(values.pop("stop"))
        now = time.monotonic()
        if self._last_time is not None:
            values["step_seconds"] = now - self._last_time
            values["tokens_per_second"] = values["tokens"] / values["step_seconds"]
        self._last_time = now
        self._writer.write(step, {f"train/{name}": value for name, value in values.items()})
        self._writer.write(step, {f"data/{name}": value for name, value in data_seconds.items()})
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if self._bar.disable and self._is_main and step % self._every_steps == 0:
                pace = f", {values['step_seconds']:.2f} s a step" if "step_seconds" in values else ""
                logger.info("step %d loss %.4f%s", step, values["loss"], pace)


def compile_train_step(config: ConfigDict, pad_id: int, state_shape: TrainState, mesh: Mesh) -> jax.stages.Compiled:
    """The train step compiled for exactly these shapes and shardings, its state donated."""
    shape, sharding = (config.batch_size, config.context_length), batch_sharding(mesh)
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=_stop_sharding(mesh))
    start = time.monotonic()
    step = jax.jit(make_train_step(config, make_optimizer(config), pad_id), donate_argnums=0)
    compiled = step.lower(state_shape, Batch(inputs=rows, targets=rows), stop).compile()
    logger.info("compiled the train step in %.1f s", time.monotonic() - start)
    return compiled


def _stop_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, jax.P(AXES))


def _stop_array(mesh: Mesh, flag: bool) -> Array:
    """int32 [devices], this host's elements set to `flag`: hosts may differ, which is the point."""
    shards = [jax.device_put(np.full(1, flag, np.int32), device) for device in mesh.local_devices]
    return jax.make_array_from_single_device_arrays((mesh.size,), _stop_sharding(mesh), shards)


def _progress(total: int, description: str, is_main: bool, initial: int = 0) -> tqdm:
    # On a terminal a bar (None: only there); in a file, lines of StepLog are easier to read.
    return tqdm(total=total, initial=initial, desc=description, unit="step", disable=None if is_main else True)
