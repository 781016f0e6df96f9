"""What one candidate of a budget search costs beside a plain evaluation pass: d = 12, windows of N = 512, selective.

python benchmarks/candidate.py [--windows 16] [--rounds 1]
"""

import argparse
import time

import numpy as np
from flax import nnx

from inference_budget import POLICIES, Budgets, Evaluator, Windows
from selective_attention import Transformer, TransformerConfig

LENGTH, VOCAB = 512, 8_192


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="rounds that are timed; the fastest counts")
    options = parser.parse_args()
    config = TransformerConfig.from_width(12, vocab_size=VOCAB, max_length=LENGTH, dtype="float32")
    model = Transformer(config, rngs=nnx.Rngs(params=0))
    text = np.random.default_rng(0).integers(4, VOCAB, (options.windows, LENGTH + 1), dtype=np.int32)
    text[:, 0] = 2
    windows, layers = Windows(text[:, :-1], text[:, 1:]), config.num_layers
    plain = Evaluator(model, windows, None), Budgets.full(layers, LENGTH)
    pruned = Evaluator(model, windows, POLICIES["selective"]), Budgets((LENGTH // 16,) * layers, LENGTH)
    seconds = []
    for evaluator, budgets in (plain, pruned):
        warm = Evaluator(model, Windows(windows.inputs, windows.targets), evaluator.policy)
        warm.losses([budgets])
        times = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            evaluator.losses([budgets])
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    print(f"plain pass {seconds[0]:.1f} s, one candidate {seconds[1]:.1f} s: {seconds[1] / seconds[0]:.2f}x")


if __name__ == "__main__":
    main()
