"""What a checkpoint costs the training loop: time of its thread, and memory of the host.

    python benchmarks/checkpoint.py [--batch-size=8] [--context-length=128] [--saves=3]

Trains a model of about 100 million parameters (fp32, with AdamW's two moments 12 bytes a parameter) on random tokens
on one device, saves in between, and prints: a step's time, how long `save` keeps the thread that trains, how long the
next step takes while the save goes on in the background, how long until the checkpoint is sealed, and by how much the
process grew over what training without a save needs, as a multiple of the state. The smaller the batch, the harder it
is to hide a save.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from configs import c4
from trainer.batches import batch_sharding
from trainer.checkpoint import Checkpoints, abstract_state
from trainer.loop import compile_train_step
from trainer.mesh import make_mesh
from trainer.state import TrainState, init_state, make_optimizer

PAD_ID = 0


class PeakMemory:
    """The largest resident size of this process since `start`, bytes, read every 5 ms."""

    def __enter__(self) -> "PeakMemory":
        self._running, self.before = True, resident_bytes()
        self.peak = self.before
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.005)


def resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(action())
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--context-length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints that are timed, after one that compiles")
    arguments = parser.parse_args()
    config = c4.get_config("d12")
    fields = {"batch_size": arguments.batch_size, "context_length": arguments.context_length, "mesh.data": 1}
    config.update_from_flattened_dict(fields | {"model.vocab_size": 16_384, "model.dtype": "float32"})
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:1]), make_optimizer(config)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as workdir:
        shape = abstract_state(jax.eval_shape(lambda: init_state(config, optimizer)), mesh)
        step = compile_train_step(config, PAD_ID, shape, mesh)
        tokens_shape = (config.batch_size, config.context_length)
        tokens = jax.random.randint(jax.random.key(0), tokens_shape, 1, config.model.vocab_size, jnp.int32)
        tokens = jax.device_put(tokens, batch_sharding(mesh))
        batch = {"inputs": tokens, "targets": tokens}
        # What else the step takes says who asks for what; nobody asks for anything here.
        others = jax.tree.map(
            lambda x, sharding: jnp.zeros(x.shape, x.dtype, device=sharding),
            step.args_info[0][2:],
            step.input_shardings[0][2:],
        )
        state = jax.jit(lambda: init_state(config, optimizer))()
        size = sum(x.nbytes for x in jax.tree.leaves(state))

        def train(state: TrainState) -> TrainState:
            return step(state, batch, *others)[0]

        steps, stalls, during, until_sealed, growth = [], [], [], [], []
        training_peak = 0
        checkpoints = Checkpoints(workdir, config, "benchmark")
        for number in range(arguments.saves + 1):
            with PeakMemory() as of_training:
                for _ in range(2):
                    seconds, state = timed(lambda state=state: train(state))
                    steps.append(seconds)
            with PeakMemory() as memory:
                start = time.perf_counter()
                checkpoints.save(number + 1, state, {}, None)
                stalls.append(time.perf_counter() - start)
                seconds, state = timed(lambda state=state: train(state))
                during.append(seconds)
                checkpoints.wait()
                until_sealed.append(time.perf_counter() - start)
            # Before any save: afterwards the allocator may keep what a save has used.
            training_peak = training_peak or of_training.peak
            growth.append((memory.peak - training_peak) / size)
            if checkpoints.failure:
                raise SystemExit(f"error: {checkpoints.failure}")
        checkpoints.close()
    step_seconds = statistics.median(steps[1:])
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(f"{parameters:,} parameters, state {size / 1e9:.2f} GB, {jax.default_backend()}, ", end="")
    print(f"batch {config.batch_size} x {config.context_length} tokens; medians of {arguments.saves} saves")
    print(f"{'':44}{'seconds':>9}{'steps':>8}")
    rows = {
        "train step": step_seconds,
        "first save: the training thread waits": stalls[0],
        "save: the training thread waits": statistics.median(stalls[1:]),
        "train step beside a save": statistics.median(during[1:]),
        "from save to sealed": statistics.median(until_sealed[1:]),
    }
    for name, seconds in rows.items():
        print(f"{name:44}{seconds:9.2f}{seconds / step_seconds:8.2f}")
    print(f"a save's memory on top of training's, at most: {max(growth):.2f} x the state")


if __name__ == "__main__":
    main()
