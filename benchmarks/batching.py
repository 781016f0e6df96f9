"""Ragged prompts through the engine, beside one `generate` after another and beside one batch of all.

    python benchmarks/batching.py [--rows 8 16 32]

Four layers as wide as those of d = 12, N = 2,048, float32, 128 slots each. 64 prompts of 8 to 512 tokens are continued
by 16 to 128 tokens each, greedily. All programs are compiled before; tokens are those that were asked for.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import numpy as np
from flax import nnx

from inference_budget import POLICIES, Budgets, Decoder, Engine, GenerationRequest
from selective_attention import Transformer, TransformerConfig

LENGTH, VOCAB = 2_048, 8_192


def ragged(count: int) -> list[GenerationRequest]:
    """Requests whose logarithms of lengths are uniform, in any order."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.geomspace(8, 512, count).astype(int))
    tokens = rng.permutation(np.geomspace(16, 128, count).astype(int))
    prompts = [[2, *rng.integers(3, VOCAB, length - 1).tolist()] for length in lengths]
    return [GenerationRequest(p, int(n), temperature=0) for p, n in zip(prompts, tokens, strict=True)]


def seconds(run: Callable[[list[GenerationRequest]], object], requests: list[GenerationRequest]) -> tuple[float, float]:
    """By the clock and of all cores, after a run of the shortest and the longest prompt, which compiles."""
    by_length = sorted(requests, key=lambda request: len(request.prompt))
    for request in (by_length[0], by_length[-1]):
        run([dataclasses.replace(request, num_tokens=2)])
    start, cpu_start = time.perf_counter(), time.process_time()
    run(requests)
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32], help="of the engine")
    parser.add_argument("--prompts", type=int, default=64, help="how many")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--slots", type=int, default=128, help="of each layer")
    options = parser.parse_args()
    config = TransformerConfig.from_width(12, vocab_size=VOCAB, max_length=LENGTH, dtype="float32")
    model = Transformer(dataclasses.replace(config, num_layers=options.layers), rngs=nnx.Rngs(params=0))
    budgets, policy = Budgets((options.slots,) * options.layers, LENGTH), POLICIES["selective"]
    requests = ragged(options.prompts)
    tokens = sum(request.num_tokens for request in requests)
    decoder = Decoder(model, budgets, policy)

    def one_after_another(requests: list[GenerationRequest]) -> None:
        for request in requests:
            decoder.generate([request.prompt], request.num_tokens, temperature=0)

    def together(requests: list[GenerationRequest]) -> None:
        decoder.generate([r.prompt for r in requests], max(r.num_tokens for r in requests), temperature=0)

    first = seconds(one_after_another, requests)
    print(f"{len(requests)} prompts of 8 to 512 tokens, {tokens:,} tokens drawn, {options.slots} slots a layer")
    print(f"{'':<28}{'seconds':>9}{'tokens/s':>10}{'beside':>8}{'CPU seconds':>13}{'beside':>8}")

    def show(name: str, taken: tuple[float, float]) -> None:
        clock, cpu = taken
        by_clock = f"{clock:>9.1f}{tokens / clock:>10.1f}{first[0] / clock:>7.2f}x"
        print(f"{name:<28}{by_clock}{cpu:>13.1f}{first[1] / cpu:>7.2f}x", flush=True)

    show("one after another", first)
    show("one batch of all", seconds(together, requests))
    for rows in options.rows:
        engine = Engine(model, budgets, policy, rows=rows)

        def run(requests: list[GenerationRequest], engine: Engine = engine) -> None:
            for request in requests:
                engine.submit(request)
            list(engine)

        show(f"engine, {rows} rows", seconds(run, requests))


if __name__ == "__main__":
    main()
