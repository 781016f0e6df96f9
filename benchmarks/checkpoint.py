"""What a checkpoint costs the training loop: time of its thread, and memory of the host.

    python benchmarks/checkpoint.py [--batch-size=8] [--context-length=128] [--saves=8]

Trains a model of about 100 million parameters (fp32, with AdamW's two moments 12 bytes a parameter) on random tokens
on one device, and saves again and again: once at rest, and once beside steps that go on until it is sealed. Prints how
long `save` keeps the thread that trains, how long the next step takes beside it, and by how much the process grew: at
rest over its resident size right before, beside steps over the peak of the steps right before. The smaller the batch,
the harder it is to hide a save.
"""

import argparse
import collections
import ctypes
import gc
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from configs import c4
from trainer.batches import batch_sharding
from trainer.checkpoints.manager import Checkpoints
from trainer.mesh import make_mesh
from trainer.settings import read_settings
from trainer.state import abstract_state, init_state
from trainer.step import compile_train_step

PAD_ID = 0
TIMES = {
    "a train step": "step",
    "a save keeps the training thread for": "stall",
    "the train step beside it": "step beside",
    "from save to sealed, without steps": "sealed",
}
MEMORY = {
    "beside steps, over the steps' own peak": "memory beside",
    "at rest, over the process right before": "memory at rest",
}


class PeakMemory:
    """The largest resident size of this process between enter and exit, bytes, read every 3 ms.

    What was freed before is given back to the system first: a save that merely used it again would look too cheap.
    """

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self.peak = resident_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.003)


def resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--context-length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--saves", type=int, default=8, help="of each kind, after one that compiles")
    arguments = parser.parse_args()
    config = c4.get_config("d12")
    fields = {"batch_size": arguments.batch_size, "context_length": arguments.context_length, "mesh.fsdp": 1}
    config.update_from_flattened_dict(fields | {"model.vocab_size": 16_384, "model.dtype": "float32"})
    settings = read_settings(config)
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as workdir:
        step = compile_train_step(settings, PAD_ID, abstract_state(settings, mesh), mesh)
        tokens_shape = (config.batch_size, config.context_length)
        tokens = jax.random.randint(jax.random.key(0), tokens_shape, 1, config.model.vocab_size, jnp.int32)
        tokens = jax.device_put(tokens, batch_sharding(mesh))
        batch = {"inputs": tokens, "targets": tokens, "bytes": jnp.zeros(config.batch_size, jnp.int32)}
        # What else the step takes says who asks for what; nobody asks for anything here.
        others = jax.tree.map(
            lambda x, sharding: jnp.zeros(x.shape, x.dtype, device=sharding),
            step.args_info[0][2:],
            step.input_shardings[0][2:],
        )
        state = jax.jit(lambda: init_state(settings))()
        size = sum(x.nbytes for x in jax.tree.leaves(state))

        def train() -> None:
            nonlocal state
            state = jax.block_until_ready(step(state, batch, *others)[0])

        checkpoints = Checkpoints(workdir, settings, "benchmark")
        numbers = itertools.count(1)

        def save() -> None:
            checkpoints.save(next(numbers), state, {}, None)

        columns: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(arguments.saves + 1):
            with PeakMemory() as training:
                columns["step"] += [timed(train) for _ in range(2)]
            with PeakMemory() as beside:
                columns["stall"].append(timed(save))
                columns["step beside"].append(timed(train))
                while checkpoints.poll() == "saving":
                    timed(train)
            columns["memory beside"].append((beside.peak - training.peak) / size)
            with PeakMemory() as at_rest:
                start = time.perf_counter()
                save()
                checkpoints.wait()
                columns["sealed"].append(time.perf_counter() - start)
            columns["memory at rest"].append((at_rest.peak - at_rest.before) / size)
            if checkpoints.failure:
                raise SystemExit(f"error: {checkpoints.failure}")
        checkpoints.close()
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(f"{parameters:,} parameters, state {size / 1e9:.2f} GB, {jax.default_backend()}, ", end="")
    print(f"batch {config.batch_size} x {config.context_length} tokens; {arguments.saves} saves of each kind")
    print_tables(columns)


def print_tables(columns: dict[str, list[float]]) -> None:
    step_seconds = statistics.median(columns["step"][2:])
    print(f"{'seconds':42}{'median':>8}{'most':>8}{'median, steps':>16}{'most, steps':>14}")
    for name, key in TIMES.items():
        values = columns[key][2 if key == "step" else 1 :]
        median, most = statistics.median(values), max(values)
        print(f"{name:42}{median:8.2f}{most:8.2f}{median / step_seconds:16.2f}{most / step_seconds:14.2f}")
    print(f"the first save, which compiles, keeps the training thread for {columns['stall'][0]:.2f} s")
    print(f"{'memory of a save, in states':42}{'median':>8}{'most':>8}")
    for name, key in MEMORY.items():
        print(f"{name:42}{statistics.median(columns[key][1:]):8.2f}{max(columns[key][1:]):8.2f}")


if __name__ == "__main__":
    main()
