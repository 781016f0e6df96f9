"""Decoding on this machine: the full cache beside budgets of 1/4, 1/16 and 1/47 of the context.

    python benchmarks/decode.py [--cache-dtype float32 bfloat16 int8] [--peer PYTHON]

d = 12, N = 2,048, float32, at position 1,024: pruned caches are full and evict at every step, the full one is computed
over all its slots, as static shapes have it. `--cache-dtype` are the dtypes that keys and values are held in. Beside
the time of a step stands that of all processors together, which other work on the machine changes less. `--peer` is a
Python with torch and transformers, whose Llama of the same size is timed with its static cache, by
benchmarks/peers/transformers_decode.py. Where libtpu is installed, the TPU compiler says what the pruned caches take on
a v4 chip.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

import jax
import jax.numpy as jnp
from flax import nnx

from inference_budget import POLICIES, Budgets, cache_bytes, init_pruned_cache
from inference_budget.generation import CHUNK, Sampling, decode
from launch.slices import find
from selective_attention import Cache, Selection, Transformer, TransformerConfig, init_cache
from selective_attention.transformer.decoding import for_decoding

LENGTH, VOCAB = 2_048, 8_192


def step_time(model: Transformer, cache: Cache, batch: int, steps: int) -> tuple[float, float]:
    """Seconds a step of what `Decoder` runs, a loop of `steps`, by the clock and of all processors together: the
    medians of three runs after the first.
    """
    graph, parameters = nnx.split(for_decoding(model))
    logits_BV, times = jnp.zeros((batch, VOCAB)), []
    key, greedy = jax.random.key(0), Sampling(temperature=0.0)
    for _ in range(4):
        start, before = time.perf_counter(), time.process_time()
        tokens_CB, logits_BV, cache = decode(graph, parameters, logits_BV, cache, key, 0, steps, greedy)
        jax.block_until_ready((tokens_CB, logits_BV, cache))
        times.append(((time.perf_counter() - start) / steps, (time.process_time() - before) / steps))
    seconds, processor_seconds = zip(*times[1:], strict=True)
    return statistics.median(seconds), statistics.median(processor_seconds)


def pruned(config: TransformerConfig, batch: int, budget: int, dtype: str | None = None) -> Cache:
    """A cache whose slots are all taken, by the most recent tokens."""
    budgets = Budgets((budget,) * config.num_layers, LENGTH)
    cache = init_pruned_cache(config, batch, budgets, POLICIES["selective"], dtype)
    position = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.arange(LENGTH // 2 - budget + 1, LENGTH // 2)])
    layers = tuple(
        dataclasses.replace(layer, position=jnp.broadcast_to(position, layer.position.shape) + 0)
        for layer in cache.layers
    )
    return Cache(jnp.full(batch, LENGTH // 2, jnp.int32), layers)


def v4_bytes(cache: Cache) -> int:
    """What the cache takes on a TPU v4 chip, whose tiles pad it."""
    chip = jax.sharding.SingleDeviceSharding(find("v4-8").describe(num_slices=1).devices[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), cache.layers)
    same = jax.jit(lambda layers: layers, donate_argnums=0).lower(abstract).compile()
    return same.memory_analysis().argument_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", help="a Python with torch and transformers")
    parser.add_argument("--steps", type=int, default=8, help=f"steps of a run, at most {CHUNK}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--cache-dtype", nargs="+", default=["float32"], help="of keys and values, several at once")
    parser.add_argument("--layers", type=int, default=12, help="fewer, for a quick look")
    options = parser.parse_args()
    config = TransformerConfig.from_width(12, vocab_size=VOCAB, max_length=LENGTH, dtype="float32")
    config = dataclasses.replace(config, num_layers=options.layers)
    model = Transformer(config, rngs=nnx.Rngs(params=0))
    standard = Transformer(dataclasses.replace(config, selection=Selection.OFF), rngs=nnx.Rngs(params=0))
    print(f"{'batch':>5}  {'cache':<32}{'bytes':>15}  {'ms a step':>10}  {'CPU ms':>8}  {'tokens/s':>9}")
    for batch in options.batch:

        def show(name: str, size: int, seconds: float, processor: float | None = None, batch: int = batch) -> None:
            cpu_ms = "" if processor is None else f"{1e3 * processor:.1f}"
            columns = f"{size:>15,}  {1e3 * seconds:>10.1f}  {cpu_ms:>8}  {batch / seconds:>9.1f}"
            print(f"{batch:>5}  {name:<32}{columns}", flush=True)

        for dtype in options.cache_dtype:
            for name, which in (("full, standard", standard), ("full, selective", model)):
                cache = init_cache(which.config, batch, LENGTH, dtype)
                cache = Cache(cache.position + LENGTH // 2, cache.layers)
                size = cache_bytes(cache)
                show(f"{name}, {dtype}", size, *step_time(which, cache, batch, options.steps))
            for part in (4, 16, 47):
                cache = pruned(config, batch, LENGTH // part, dtype)
                size, name = cache_bytes(cache), f"1/{part}: {LENGTH // part} slots a layer, {dtype}"
                show(name, size, *step_time(model, cache, batch, options.steps))
        if options.peer:
            script = Path(__file__).parent / "peers/transformers_decode.py"
            command = [options.peer, str(script), "--batch", str(batch), "--layers", str(options.layers)]
            peer = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            show(f"transformers {peer['version']}", peer["bytes"], peer["seconds"])
    if importlib.util.find_spec("libtpu") is not None:
        for slots in (LENGTH // 4, LENGTH // 16, LENGTH // 47):
            cache = pruned(config, 32, slots)
            size, on_chip = cache_bytes(cache), v4_bytes(cache)
            print(f"batch 32, {slots} slots a layer: {size:,} bytes, {on_chip:,} on v4, {on_chip / size:.2f}x")


if __name__ == "__main__":
    main()
