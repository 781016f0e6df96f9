"""Validation on the way and at the end, and what the selection masks meanwhile; both into TensorBoard."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax import Array

from trainer.batches import batch_sharding, global_batch
from trainer.evaluate import Evaluation, evaluate
from trainer.job import Job
from trainer.metrics import pictures
from trainer.metrics.json_lines import read_metrics
from trainer.metrics.terminal import progress_bar
from trainer.metrics.writer import MetricsWriter
from trainer.step import make_eval_step, make_selection_step


class Validation:
    """Evaluates the parameters of one run."""

    def __init__(self, job: Job, writer: MetricsWriter, requests: Callable[[], Array]) -> None:
        """`requests` as in `evaluate`."""
        settings = job.settings
        self._batches = job.source.validation
        self._sharding, self._phases, self._is_main = batch_sharding(job.mesh), job.phases, job.is_main
        self._writer, self._requests = writer, requests
        model, architecture, tau = settings.transformer, settings.model.architecture, settings.memory_loss.tau
        self._eval_step = jax.jit(make_eval_step(model, job.pad_id, job.source.has_answers, architecture))
        self._workdir, self._every_steps, self._draws = job.workdir, settings.eval.every_steps, settings.eval.pictures
        inputs_BN = self._batches.rows(0, range(1))["inputs"]
        self._tokens = [job.source.piece(token) for token in inputs_BN[0]]  # of the text of the pictures
        self._selection_step = (
            jax.jit(make_selection_step(model, tau, job.pad_id, architecture)) if settings.model.selective else None
        )

    def __call__(self, name: str, step: int, params: nnx.State, num_batches: int | None = None) -> Evaluation | None:
        """Writes loss and perplexity of so many batches, by default all, under `name`, and the selection's statistics;
        None if a host was told to stop meanwhile.
        """
        num_batches = min(num_batches or self._batches.num_batches, self._batches.num_batches)
        with (
            self._phases("an evaluation batch", "evaluation") as next_batch,
            progress_bar(num_batches, name, self._is_main) as bar,
        ):

            def on_batch() -> None:
                next_batch()
                bar.update()

            result = evaluate(
                self._eval_step, params, self._batches, num_batches, self._sharding, self._requests, on_batch
            )
        if result is not None:
            self._writer.write(step, {f"run/validation_{name}": value for name, value in result.figures().items()})
            if self._selection_step is not None:
                with self._phases("the selection's statistics", "evaluation"):
                    with jax.transfer_guard("allow"):  # in this thread, unlike all other batches
                        batch = global_batch(self._batches, 0, self._sharding)
                    self._show(step, jax.device_get(self._selection_step(params, batch)), name == "final")
        return result

    def _show(self, step: int, statistics: dict[str, np.ndarray], is_final: bool) -> None:
        """Of every layer, and every so often pictures; `statistics` as `make_selection_step`."""
        text_f = statistics.pop("text_f")
        for statistic, value_L in statistics.items():
            layers = {f"selection_{statistic}/layer_{n:02d}": float(value) for n, value in enumerate(value_L)}
            self._writer.write(step, layers | {f"selection/{statistic}": float(value_L.mean())})
        if self._is_main and self._draws and (is_final or pictures.is_due(step // self._every_steps)):
            self._writer.flush()
            self._writer.image(
                step, "selection/layers", pictures.layers_over_steps(read_metrics(self._workdir).scalars)
            )
            self._writer.image(step, "selection/text", pictures.text_masks(text_f, self._tokens[: text_f.shape[-1]]))
