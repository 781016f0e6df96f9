"""Time and memory of selective and standard attention, side by side, on this machine.

    python benchmarks/attention.py [--lengths 256,512,1024,2048,4096,8192] [--peer PYTHON]
    python benchmarks/attention.py --trained RUN [--data DATASET] [--batch 4]
    python benchmarks/attention.py --remembered [--lengths 1024,2048] [--heads 4] [--rounds 20]

Prints a table: milliseconds (the fastest of some rounds; all rows of one length take turns) and the temporaries that
the compiler reports, of one forward pass and of one with gradients of q, k, v.
Rows: "reference" is the definition, with N x N arrays; "xla" works in blocks; each with selection and without it.
`--peer` is a Python that has torch and x-transformers (see peers/x_transformers_attention.py) and adds its rows: its
selective attention, and torch's fused standard attention. What needs N x N arrays is not timed above N = 4,096.
Random inputs forget nearly everything within a few hundred tokens, so here no key is dropped.

`--trained` takes q, k, v of every layer of a training run's model on windows of its held-out text, and times attention
to living keys beside attention to all of them ("xla", forward and backward, with and without selection): the time of
all processors together, which other work on the machine changes least. The difference of results is relative to the
largest entry. `--remembered` does the same with random q so small that no key is ever forgotten: what looking for
forgotten ones costs where there are none.
"""

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from data import open_dataset
from launch.budgets.inputs import load_model, read_windows
from launch.evaluate.caches import data_of_run
from selective_attention import Selection, selective_attention
from selective_attention.attention import AttentionOptions
from selective_attention.transformer.transformer import attending

PEER = Path(__file__).parent / "peers" / "x_transformers_attention.py"
ROWS = [
    ("xla", Selection.PAPER),
    ("xla", Selection.OFF),
    ("reference", Selection.PAPER),
    ("reference", Selection.OFF),
]
LONGEST_QUADRATIC = 4096  # above, what holds N x N arrays is not run: they do not fit a laptop


def compiled_pair(implementation: str, selection: Selection, shape: tuple[int, ...]):
    """(forward, forward + backward), compiled for q, k, v of this shape."""

    def forward(q, k, v):
        return selective_attention(q, k, v, selection=selection, logit_bound=math.inf, implementation=implementation)

    def loss(q, k, v):
        return jnp.sum(forward(q, k, v) ** 2)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    return [jax.jit(f).lower(*arrays).compile() for f in (forward, jax.grad(loss, argnums=(0, 1, 2)))]


def fastest(
    programs: dict, arrays: list[jax.Array], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict:
    """Milliseconds of each program: the fastest of `rounds` turns, after one that does not count."""
    best = dict.fromkeys(programs, float("inf"))
    for n in range(rounds + 1):
        for name, program in programs.items():
            start = clock()
            jax.block_until_ready(program(*arrays))
            if n:
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def of_layers(model, tokens_BN: jax.Array) -> list[tuple[list[jax.Array], float | None]]:
    """What attention is computed from in every layer (q, k, v, and q_sel, k_sel if it has them), and `logit_bound`."""
    graph, parameters = nnx.split(model.blocks)
    position_N = jnp.arange(tokens_BN.shape[1], dtype=jnp.int32)
    x_BNE, made = model.embed(tokens_BN, position_N), []
    for layer in range(model.config.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda x, layer=layer: x[layer], parameters))

        def attend(*projections, block=block):
            bound = block.logit_bound
            made.append(([x for x in projections if x is not None], None if bound is None else float(bound)))
            return attending(model.config, AttentionOptions(logit_bound=bound))(*projections)

        x_BNE, _ = block(x_BNE, position_N, attend)
    return made


def living_programs(arrays: list[jax.Array], bound: float | None) -> dict:
    """Forward and backward of attention to all keys and to living ones, compiled."""

    def program(selection: Selection, logit_bound: float | None):
        def loss(q, k, v, *selecting):
            q_sel, k_sel = selecting or (None, None)
            out = selective_attention(q, k, v, q_sel=q_sel, k_sel=k_sel, selection=selection, logit_bound=logit_bound)
            assert isinstance(out, jax.Array)  # no memory statistic is asked for
            return jnp.sum(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape) * out), out

        return jax.jit(jax.value_and_grad(loss, argnums=range(len(arrays)), has_aux=True)).lower(*arrays).compile()

    return {
        "standard": program(Selection.OFF, math.inf),
        "all keys": program(Selection.PAPER, math.inf),
        "living": program(Selection.PAPER, bound),
    }


def trained(args: argparse.Namespace) -> None:
    """The table of `--trained`."""
    model = load_model(args.trained)
    dataset = open_dataset(args.data) if args.data else data_of_run(args.trained)
    windows = read_windows(dataset, "validation", model.config.max_length, args.batch)
    compare(args.trained, of_layers(model, jnp.asarray(windows.inputs)), args.rounds)


def remembered(args: argparse.Namespace) -> None:
    """The tables of `--remembered`: the bound is that of these q and k, far from what any F comes to."""
    for length in map(int, args.lengths.split(",")):
        shape = (args.batch, length, args.heads, args.head_dim)
        q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
        bound = float(jnp.linalg.norm(q / 20, axis=-1).max() * jnp.linalg.norm(k, axis=-1).max()) / args.head_dim**0.5
        compare("random q, k and v", [([q / 20, k, v], bound)], args.rounds)


def compare(what: str, layers: list[tuple[list[jax.Array], float | None]], rounds: int) -> None:
    """Prints a row for each layer's arrays and bound, and their sum."""
    shape = layers[0][0][0].shape
    heads = f"{shape[2]} heads of width {shape[3]}"
    print(f"{what}: {shape[0]} windows of N = {shape[1]:,}, {heads}, ms of processor time")
    print("  layer    standard  all keys    living   of standard   of all keys   difference: out      gradients")
    sums = dict.fromkeys(("standard", "all keys", "living"), 0.0)
    for number, (arrays, bound) in enumerate(layers):
        programs = living_programs(arrays, bound)
        times = fastest(programs, arrays, rounds, time.process_time)
        (whole, living) = (jax.tree.leaves(programs[name](*arrays))[1:] for name in ("all keys", "living"))
        off = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in zip(whole, living, strict=True)]
        sums = {name: sums[name] + times[name] for name in sums}
        cells = "".join(f"{times[name]:10.1f}" for name in sums)
        print(f"{number:7d}  {cells}{_ratios(times)}{off[0]:18.1e}{max(off[1:]):15.1e}")
    print("    all  " + "".join(f"{x:10.1f}" for x in sums.values()) + _ratios(sums))


def _ratios(times: dict[str, float]) -> str:
    return f"{times['living'] / times['standard']:12.2f}x{times['living'] / times['all keys']:13.2f}x"


def peer_times(python: str, args: argparse.Namespace, length: int) -> dict[str, list[float]]:
    options = {"length": length, "heads": args.heads, "head-dim": args.head_dim, "batch": args.batch}
    command = [python, str(PEER), "--rounds", str(args.rounds)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192", help="values of N, with commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python with torch and x-transformers")
    parser.add_argument("--trained", metavar="RUN", help="a training run's workdir, or an exported folder with --data")
    parser.add_argument("--data", metavar="DATASET", help="with --trained; by default what the run read")
    parser.add_argument("--remembered", action="store_true", help="what looking for forgotten keys costs without any")
    args = parser.parse_args()
    if args.trained or args.remembered:
        (trained if args.trained else remembered)(args)
        return

    print(f"{jax.default_backend()}, float32, batch {args.batch}, {args.heads} heads of width {args.head_dim}")
    print("     N  attention                   forward   + backward     temporaries MiB (forward, + backward)")
    for length in map(int, args.lengths.split(",")):
        shape = (args.batch, length, args.heads, args.head_dim)
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, shape) for key in keys]
        pairs = {row: compiled_pair(*row, shape) for row in ROWS}
        timed = {row for row in ROWS if row[0] != "reference" or length <= LONGEST_QUADRATIC}
        times = [fastest({row: pairs[row][n] for row in ROWS if row in timed}, arrays, args.rounds) for n in (0, 1)]
        for row in ROWS:
            name = f"{row[0]}, {'standard' if row[1] is Selection.OFF else 'selective'}"
            cells = "".join(f"{time[row]:10.1f} ms" if row in timed else "         -   " for time in times)
            memory = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in pairs[row]]
            print(f"{length:6d}  {name:22s}{cells}  {memory[0]:10.1f}{memory[1]:12.1f}", flush=True)
        if args.peer and length <= LONGEST_QUADRATIC:
            for name, milliseconds in peer_times(args.peer, args, length).items():
                cells = "".join(f"{x:10.1f} ms" for x in milliseconds)
                print(
                    f"{length:6d}  {'x-transformers, ' + name if name == 'selective' else 'torch, ' + name:22s}{cells}"
                )


if __name__ == "__main__":
    main()
