"""x-transformers' attention, timed; `benchmarks/attention.py --peer PYTHON` runs it in an environment of its own.

    pip install torch x-transformers        # in that environment; neither is needed by anything else here
    python benchmarks/peers/x_transformers_attention.py --length 1024 --heads 12 --head-dim 64 --batch 1 --rounds 5

Prints a JSON object: milliseconds, forward and forward + backward, with and without `selective`.
"""

import argparse
import json
import time

import torch
from x_transformers.attend import Attend


def milliseconds(attend: Attend, arrays: list[torch.Tensor], backward: bool, rounds: int) -> float:
    """The fastest of some rounds, after one that does not count."""
    best = float("inf")
    for n in range(rounds + 1):
        start = time.perf_counter()
        if backward:
            out, _ = attend(*arrays)
            (out**2).sum().backward()
        else:
            with torch.no_grad():
                attend(*arrays)
        if n:
            best = min(best, time.perf_counter() - start)
        for array in arrays:
            array.grad = None
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("length", "heads", "head-dim", "batch", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = (args.batch, args.heads, args.length, args.head_dim)
    arrays = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    result = {}
    for name, options in {"selective": {"selective": True}, "standard": {"flash": True}}.items():
        attend = Attend(causal=True, **options)
        result[name] = [milliseconds(attend, arrays, backward, args.rounds) for backward in (False, True)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
