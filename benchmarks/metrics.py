"""What metrics cost: the training loop's time in each step, and the bytes of a full run.

    python benchmarks/metrics.py [--steps=524288] [--layers=12] [--step-ms=50]

Gives the loop's own code the numbers of a run of so many steps, with norms, selection and pictures of so many layers,
and no model: what it takes then is what metrics cost. Prints that time, on average and at most, also as a share of a
step of `--step-ms`; the size of both files; and how long TensorBoard and `read_metrics` take to load them. Losses,
times and norms are random walks, since constant ones would compress better than a run's.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import c4
from trainer.goodput import Goodput, Phases
from trainer.hosts.watchdog import Watchdog
from trainer.job import Job
from trainer.mesh import make_mesh
from trainer.metrics import pictures
from trainer.metrics.json_lines import METRICS_FILE, JsonLinesWriter, read_metrics
from trainer.metrics.steps import StepLog
from trainer.metrics.tensorboard import TensorBoardWriter
from trainer.metrics.terminal import progress_bar
from trainer.metrics.thinning import is_kept
from trainer.metrics.writer import Metrics
from trainer.outcomes import NORMS_EVERY, Outcome
from trainer.settings import read_settings
from trainer.step import TEXT_TOKENS

PAST = 86_400.0  # seconds before now in which the run seems to have been


def simulate(workdir: str, steps: int, layers: int, eval_every: int) -> tuple[np.ndarray, float]:
    """Writes a run; seconds of every step on the clock, and processor seconds of all of them together."""
    config = c4.get_config(f"d{layers}")
    config.mesh.fsdp = 1
    settings = read_settings(config)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    goodput = Goodput(workdir, time.time() - PAST, is_main=True)
    phases = Phases(Watchdog(60, 20, 1800), goodput)
    # The loop's job without a dataset, checkpoints or a model, of which metrics say nothing on the way.
    job = Job(settings, workdir, mesh, None, None, None, phases, None, time.time(), True)  # type: ignore[arg-type]
    tensorboard = TensorBoardWriter(f"{workdir}/tensorboard", 1)
    writer = Metrics([tensorboard, JsonLinesWriter(f"{workdir}/{METRICS_FILE}", 1)])
    began = time.monotonic()
    with progress_bar(steps, "train", is_main=False) as bar:
        log = StepLog(job, writer, bar, lambda: began)
        rng = np.random.default_rng(0)
        losses = 3 + np.cumsum(rng.normal(0, 1e-3, steps))
        seconds = np.zeros(steps)
        processor = 0.0
        for step in range(1, steps + 1):
            outcome = make_outcome(rng, step, float(losses[step - 1]), layers)
            start, start_processor = time.perf_counter(), time.process_time()
            log.write(outcome)
            if step % eval_every == 0:
                show_selection(writer, workdir, rng, step, layers, eval_every)
            if step % settings.checkpoint.every_steps == 0:
                writer.flush()
            processor += time.process_time() - start_processor
            seconds[step - 1] = time.perf_counter() - start
    writer.close()
    return seconds, processor


def make_outcome(rng: np.random.Generator, step: int, loss: float, layers: int) -> Outcome:
    metrics = {"loss": loss, "memory_loss": 0.0, "grad_norm": rng.lognormal(), "learning_rate": 0.005 / step}
    metrics |= {"tokens": 131_072.0, "bytes": 550_000.0, "bad_steps": 0.0}
    norms = None
    if is_kept(step, NORMS_EVERY):
        kinds = {"attention": (layers,), "mlp": (layers,), "norms": (layers,), "embedding": (), "final_norm": ()}
        groups = ("gradient", "update", "parameter")
        norms = {group: {kind: rng.lognormal(size=shape) for kind, shape in kinds.items()} for group in groups}
    return Outcome(step, metrics, norms, 0.01, 0.0, 0.05 * rng.lognormal(sigma=0.02), 0.001)


def show_selection(
    writer: Metrics, workdir: str, rng: np.random.Generator, step: int, layers: int, eval_every: int
) -> None:
    """What validation writes."""
    writer.write(step, {f"run/validation_{name}": rng.lognormal() for name in ("loss", "perplexity", "bits_per_byte")})
    for statistic in ("mean_f", "forgotten_fraction", "peak_memory", "memory_loss"):
        writer.write(step, {f"selection_{statistic}/layer_{n:02d}": rng.lognormal() for n in range(layers)})
    if pictures.is_due(step // eval_every):
        writer.flush()
        writer.image(step, "selection/layers", pictures.layers_over_steps(read_metrics(workdir).scalars))
        f_LNN = np.tril(rng.lognormal(size=(layers, TEXT_TOKENS, TEXT_TOKENS)))
        writer.image(step, "selection/text", pictures.text_masks(f_LNN, ["token"] * TEXT_TOKENS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=524_288, help="of the run")
    parser.add_argument("--layers", type=int, default=12, help="of the model, one of the sizes of configs/c4.py")
    parser.add_argument("--step-ms", type=float, default=50.0, help="what a step takes the devices")
    arguments = parser.parse_args()
    eval_every = 5_000
    with tempfile.TemporaryDirectory() as workdir:
        seconds, processor = simulate(workdir, arguments.steps, arguments.layers, eval_every)
        mean = processor / arguments.steps
        share = mean / (arguments.step_ms / 1e3)
        print(f"{arguments.steps:,} steps of {arguments.layers} layers")
        print(f"a step: {1e6 * mean:.0f} us of processor, {share:.2%} of {arguments.step_ms:.0f} ms; ", end="")
        print(f"by the clock {1e6 * np.median(seconds):.0f} us in the median, {seconds.max():.2f} s at most")
        events = sum(path.stat().st_size for path in Path(workdir, "tensorboard").iterdir())
        lines = Path(workdir, METRICS_FILE).stat().st_size
        start = time.process_time()
        EventAccumulator(f"{workdir}/tensorboard", size_guidance={"scalars": 0}).Reload()
        loaded = time.process_time()
        metrics = read_metrics(workdir)
        read = time.process_time()
        points = sum(len(series.steps) for series in metrics.scalars.values())
        losses = len(metrics.scalars["run/loss"].steps)
        print(f"{points:,} points of {len(metrics.scalars)} scalars, {losses:,} of the loss")
        print(f"TensorBoard's file: {events / 1e6:.1f} MB, loaded in {loaded - start:.1f} s of processor")
        print(f"{METRICS_FILE}: {lines / 1e6:.1f} MB, read in {read - loaded:.1f} s")


if __name__ == "__main__":
    main()
