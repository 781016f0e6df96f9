"""What one candidate of a budget search costs beside a plain evaluation pass: d = 12, windows of N = 512, selective.

    python benchmarks/candidate.py [--windows 16] [--rounds 3]

The clock runs on the CPU. Where libtpu is installed, the scan that finds a layer's eviction times is compiled for TPU
v4 as well, for one candidate and for several as rows of one batch, beside the layer's plain pass: milliseconds at
1.05 GHz of the cycles that the TPU compiler estimates, for one chip. No TPU is needed.
"""

import argparse
import dataclasses
import importlib.util
import os
import time

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from inference_budget import POLICIES, Budgets, Evaluator, Windows
from inference_budget.perplexity import layer_pass
from launch.plan.hlo import Program
from launch.slices import find
from selective_attention import Transformer, TransformerConfig

LENGTH, VOCAB, BUDGET = 512, 8_192, 32
V4_HZ = 1.05e9


def on_cpu(model: Transformer, num_windows: int, rounds: int) -> None:
    text = np.random.default_rng(0).integers(4, VOCAB, (num_windows, LENGTH + 1), dtype=np.int32)
    text[:, 0] = 2
    windows, layers = Windows(text[:, :-1], text[:, 1:]), model.config.num_layers
    plain = Evaluator(model, windows, None), Budgets.full(layers, LENGTH)
    pruned = Evaluator(model, windows, POLICIES["selective"]), Budgets((BUDGET,) * layers, LENGTH)
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):  # the first compiles
        for n, (evaluator, budgets) in enumerate((plain, pruned)):
            start = time.perf_counter()
            evaluator.losses([budgets])
            times[n].append(time.perf_counter() - start)
    whole, candidate = (min(t[1:]) for t in times)
    print(f"CPU: a plain pass {whole:.1f} s, one candidate {candidate:.1f} s, {candidate / whole:.2f}x")


def on_v4(model: Transformer) -> None:
    """One layer of the evaluation, compiled for one chip."""
    chip = jax.sharding.SingleDeviceSharding(find("v4-8").describe(num_slices=1).devices[0])
    graph, parameters = nnx.split(model)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), parameters)
    print(f"{'v4, rows':>8}  {'plain layer':>11}  {'evicting layer':>14}  {'its scan':>8}  {'scan a row':>10}   (ms)")
    for rows in (16, 64, 128):
        x_BNE = jax.ShapeDtypeStruct((rows, LENGTH, model.config.d_model), jnp.bfloat16, sharding=chip)
        layer, budget_B = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=chip) for shape in ((), (rows,)))
        plain, evicting = (
            list(
                Program(
                    layer_pass.lower(graph, abstract, x_BNE, layer, budget_B, policy=policy).compile().as_text()
                ).operations()
            )
            for policy in (None, POLICIES["selective"])
        )
        scan = [operation for operation in evicting if "evict/" in operation.instruction.op_name]
        times = [1e3 * sum(o.times * o.instruction.cycles for o in part) / V4_HZ for part in (plain, evicting, scan)]
        print(
            f"{rows:>8}  {times[0]:>11.2f}  {times[1]:>14.2f}  {times[2]:>8.2f}  {times[2] / rows:>10.4f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed; the fastest of each counts")
    options = parser.parse_args()
    config = TransformerConfig.from_width(12, vocab_size=VOCAB, max_length=LENGTH, dtype="float32")
    if options.rounds:
        on_cpu(Transformer(config, rngs=nnx.Rngs(params=0)), options.windows, options.rounds)
    if importlib.util.find_spec("libtpu") is None:
        print("v4: not compiled, since libtpu is not installed")
        return
    config = dataclasses.replace(config, dtype="bfloat16", attention="reference")  # of which every trip count is known
    on_v4(Transformer(config, rngs=nnx.Rngs(params=0)))


if __name__ == "__main__":
    main()
