"""How much of its context a trained model has forgotten for good, by layer and position, and what dropping that saves.

    python benchmarks/forgotten.py [--workdir RUN] [--context N] [--thresholds 16,8,4] [--windows 32] [--plot x.png]

F only grows, so a key beyond a threshold may be dropped for all later queries. Thresholds: what float32 cannot see
(dropping it is exact to rounding), what bfloat16 cannot see, and looser ones in nats. For each, on windows of held-out
text that are computed with the keys dropped in every layer:

- the loss, minus that with everything kept, with its paired standard error;
- living: the share of earlier keys that a query still sees;
- keys held by a query, itself included: the mean over positions, and the most in any window;
- FLOPs left: the share of causal attention's pairs of queries and keys, if the dead are dropped where each block of so
  many queries begins and the block attends to what is left, and to itself causally;
- dead tiles: the share of tiles of 64 x 64 below the diagonal that are dead as they lie, without moving any key.

Shares are means over windows, of each layer. `--context` is for models with rotary positions. `--rounds` times how a
prompt is taken in, too.

    python benchmarks/tpu_kernels.py --length 2048 --programs selective,standard --json > v4.json
    python benchmarks/forgotten.py --workdir RUN --tpu v4.json [--longer 8192]

What the TPU kernels make of the keys that float32 cannot see, in a wider model (d = 12) that forgets as this one does:
of every 128 keys against a block of queries that are all dead they compute nothing. Cycles of attention in each layer
by the kernels' schedules, over those of standard attention: with no key dead, and with the dead left out. A forward
tile that is left out still costs the time of fetching its keys and values, at the published bandwidth. `--longer` goes
on beyond the context with as many living keys as the second half of it has.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data import open_dataset
from inference_budget import (
    Budgets,
    Decoder,
    Evaluator,
    Forgotten,
    Losses,
    OldestFirst,
    Windows,
    eviction_times,
    policy_for,
)
from inference_budget.generation import BLOCK
from inference_budget.perplexity import TOKENS_PER_PASS, tokens_held
from launch import charts
from launch.budgets.inputs import check_output, check_vocabulary, load_model, read_windows
from launch.commands import InputError, Parser, positive, run_to_the_end
from launch.evaluate.caches import data_of_run
from launch.plan.schedule import LISTED
from launch.slices import GENERATIONS
from selective_attention import Transformer

DEMO = Path("runs/demo/selective")
BLOCKS, TILE = (128, 256, 512), 64
PART = 128  # keys that a TPU kernel leaves out together
BFLOAT16 = 16 * math.log(2)  # nats by which its bound is below float32's: its significand has 16 bits less


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What a threshold does to a model on some windows.

    Attributes:
      name: of the threshold.
      policy: with the threshold of each layer.
      losses: with the keys beyond it dropped.
      hidden_at: int32 [L, W, N], the first query that does not see each key; above N, if all do.
    """

    name: str
    policy: Forgotten
    losses: Losses
    hidden_at: np.ndarray

    @property
    def living(self) -> np.ndarray:
        """The share of its earlier keys that each query but the first sees, [L, N - 1]."""
        earlier = np.arange(1, self.hidden_at.shape[-1])
        return (tokens_held(self.hidden_at)[..., 1:] - 1).mean(axis=1) / earlier

    def flops_left(self, block: int) -> np.ndarray:
        """The share of causal attention's pairs that is left in each layer, [L]."""
        length = self.hidden_at.shape[-1]
        starts = np.arange(0, length, block)
        sizes = np.minimum(block, length - starts)
        living = (tokens_held(self.hidden_at)[..., starts] - 1).mean(axis=1)
        return (living * sizes + sizes * (sizes + 1) / 2).sum(axis=-1) / (length * (length + 1) / 2)

    def dead_tiles(self) -> np.ndarray:
        """The share of whole tiles below the diagonal that no query of theirs sees any key of, [L]."""
        layers, windows, length = self.hidden_at.shape
        tiles = length // TILE
        last = self.hidden_at[..., : tiles * TILE].reshape(layers, windows, tiles, TILE).max(axis=-1)
        dead = last[..., None, :] <= np.arange(tiles)[:, None] * TILE  # [L, W, tiles of queries, tiles of keys]
        below = np.tri(tiles, k=-1, dtype=bool)
        return (dead & below).mean(axis=1).sum(axis=(1, 2)) / max(below.sum(), 1)


class Kernel(NamedTuple):
    """Cycles of a TPU kernel of one sequence and group of heads."""

    side: int  # of a tile, in positions
    whole: int
    diagonal: int
    part: int  # of a tile against `PART` keys
    ends: int  # of a block of queries or keys
    step: int  # of the grid
    listed: bool  # whether the grid has steps for tiles alone in which something lives
    skipped: float  # of fetching what is then left out

    @classmethod
    def read(cls, row: dict) -> "Kernel":
        """From a row of `benchmarks/tpu_kernels.py --json`."""
        whole, diagonal, *rare = row["tiles"]
        fetches = row["kernel"].endswith("forward")  # the backward kernel knows beforehand what it leaves out
        chip = GENERATIONS[row["generation"]]
        bytes_fetched = fetches * row["block"] * (2 * row["heads"] + 1) * row["width"] * 2
        cycles = bytes_fetched * chip.cores / chip.hbm_bandwidth * chip.clock
        ends, step = row["bundles_ends"], row["bundles_other"]
        listed = row["kernel"] in LISTED
        return cls(row["block"], whole, diagonal, rare[0] if rare else whole, ends, step, listed, max(0, cycles - step))

    def all_cycles(self, length: int) -> float:
        """At this length, with no key dead."""
        blocks = length // self.side
        below = blocks * (blocks - 1) / 2
        return below * self.whole + self._fixed(blocks, below)

    def cycles(self, hidden_at: np.ndarray, length: int) -> np.ndarray:
        """Of each layer [L], at this length, where keys are hidden as `Dropped` says."""
        layers, windows, given = hidden_at.shape
        parts, given = self.side // PART, given // self.side
        last = hidden_at[..., : given * self.side].reshape(layers, windows, given * parts, PART).max(axis=-1)
        starts = self.side * np.arange(given)[:, None]
        alive = (last[..., None, :] > starts).reshape(layers, windows, given, given, parts).sum(axis=-1)
        alive *= np.tri(given, k=-1, dtype=int)
        cost = np.where(alive == parts, self.whole, np.maximum(self.part * alive, self.skipped)) * (alive > 0)
        of_rows, tiles = cost.sum(axis=-1).mean(axis=1), (alive > 0).sum(axis=-1)  # [L, (W,) blocks of queries]
        # All sequences of a batch have the steps of the one that has most.
        most = np.take_along_axis(tiles, tiles.sum(axis=-1).argmax(axis=1)[:, None, None], axis=1)[:, 0]
        blocks = length // self.side

        def longer(x: np.ndarray) -> np.ndarray:
            more = np.repeat(x[:, given // 2 :].mean(axis=1), blocks - given)
            return np.concatenate([x, more.reshape(layers, -1)], axis=1)

        skipped = self.skipped * (np.arange(blocks) - longer(tiles.mean(axis=1)))
        return (longer(of_rows) + skipped).sum(axis=1) + self._fixed(blocks, longer(most).sum(axis=1))

    def _fixed(self, blocks: int, below: Any) -> Any:
        steps = below + blocks if self.listed else blocks**2
        return blocks * (self.diagonal + self.ends) + steps * self.step


def tpu_table(schedules: Sequence[dict], hidden_at: np.ndarray, longer: Sequence[int]) -> Iterator[str]:
    """The lines of what `--tpu` prints."""
    length = hidden_at.shape[-1]
    made = {
        program: [Kernel.read(row) for row in schedules if row["program"] == program]
        for program in ("selective", "standard")
    }
    shape = "{generation}, {heads} heads of {width}".format(**schedules[0])
    yield f"{shape}, of standard attention's cycles: forward, backward, both"
    yield "      N  layer    no key dead              the dead left out"
    layers = [*range(hidden_at.shape[0]), None]
    for n in (length, *longer):
        standard = np.array([kernel.all_cycles(n) for kernel in made["standard"]])
        everything = np.array([kernel.all_cycles(n) for kernel in made["selective"]])
        living = np.array([kernel.cycles(hidden_at, n) for kernel in made["selective"]])  # [2, L]
        for layer in layers:
            of_layer = living.mean(axis=1) if layer is None else living[:, layer]
            rows = [[*(cycles / standard), cycles.sum() / standard.sum()] for cycles in (everything, of_layer)]
            cells = ("".join(f"{x:7.2f}x" for x in row) for row in rows)
            yield f"{n:7,}  {'mean' if layer is None else layer:>5}" + "  ".join(cells)


def policies(model: Transformer, looser: Sequence[float]) -> Iterator[tuple[str, Forgotten]]:
    """Each threshold's name and values, the strictest first."""
    layers = model.config.num_layers
    if model.config.qk_norm:
        exact = policy_for(Forgotten(), model)
        assert isinstance(exact, Forgotten) and exact.above is not None
        yield "float32", exact
        yield "bfloat16", Forgotten(tuple(nats - BFLOAT16 for nats in exact.above))
    for nats in looser:
        yield f"F > {nats:g}", Forgotten((nats,) * layers)


def drop(model: Transformer, windows: Windows, name: str, policy: Forgotten) -> Dropped:
    """Computes the windows with the keys that the policy forgets dropped in every layer."""
    full = Budgets.full(model.config.num_layers, windows.length)
    rows = max(1, TOKENS_PER_PASS // windows.length)
    hidden_at, nll = [], []
    for start in range(0, len(windows), rows):
        part = slice(start, start + rows)
        hidden_at_LBN, logits_BNV = eviction_times(model, windows.inputs[part], full, policy)
        hidden_at.append(np.asarray(hidden_at_LBN))
        nll.append(np.asarray(_nll(logits_BNV, windows.targets[part])))
    return Dropped(name, policy, Losses.of(np.concatenate(nll)), np.concatenate(hidden_at, axis=1))


@jax.jit
def _nll(logits_BNV: jax.Array, targets_BN: jax.Array) -> jax.Array:
    picked_BN1 = jax.numpy.take_along_axis(logits_BNV, targets_BN[..., None], axis=-1)
    return jax.nn.logsumexp(logits_BNV, axis=-1) - picked_BN1[..., 0]


def table(all_dropped: Sequence[Dropped], full: Losses) -> Iterator[str]:
    """The lines of what is printed."""
    length = all_dropped[0].hidden_at.shape[-1]
    queries = [*(2**n for n in range(7, length.bit_length()) if 2**n < length - 1), length - 1]
    blocks = [block for block in BLOCKS if block < length]
    living = f"{'living, % of the keys before query':<{7 * len(queries)}}"
    yield " " * 47 + f"{living}   keys held        FLOPs left, % by blocks; dead tiles"
    head = f"{'dropped':<10}{'loss':>10}{'± s.e.':>9}  {'layer':>5}{'F above':>9}  "
    head += "".join(f"{query:>7,}" for query in queries) + f"{'mean':>10}{'most':>7}  "
    yield head + "".join(f"{block:>8}" for block in blocks) + f"{'tiles':>8}"
    for dropped in all_dropped:
        change, error = dropped.losses.minus(full)
        living, dead = 100 * dropped.living, 100 * dropped.dead_tiles()
        left, held = [100 * dropped.flops_left(block) for block in blocks], tokens_held(dropped.hidden_at)
        assert dropped.policy.above is not None
        for layer, above in enumerate(dropped.policy.above):
            begin = f"{dropped.name:<10}{change:>+10.5f}{error:>9.5f}" if layer == 0 else " " * 29
            cells = "".join(f"{living[layer, query - 1]:>7.1f}" for query in queries)
            cells += f"{held[layer].mean():>10.1f}{held[layer].max():>7,}  "
            cells += "".join(f"{share[layer]:>8.1f}" for share in left)
            yield f"{begin}  {layer:>5}{above:>9.1f}  {cells}{dead[layer]:>8.1f}"


def prefill_times(model: Transformer, prompt: Sequence[int], exact: Forgotten, rounds: int) -> tuple[float, float]:
    """Milliseconds, the fastest of some rounds, of taking in a prompt: into a full cache, and into one that forgets."""
    full, best = Budgets.full(model.config.num_layers, model.config.max_length), [math.inf, math.inf]
    decoders = [Decoder(model, full, policy) for policy in (OldestFirst(), exact)]
    for n in range(rounds + 1):  # the first compiles
        for number, decoder in enumerate(decoders):
            start = time.perf_counter()
            jax.block_until_ready(decoder.prefill([prompt]))
            best[number] = min(best[number], 1e3 * (time.perf_counter() - start)) if n else math.inf
    return best[0], best[1]


def plot(path: str, all_dropped: Sequence[Dropped]) -> None:
    """A PNG: how many earlier keys live against the position, a panel for each layer, a line for each threshold."""
    layers = all_dropped[0].living.shape[0]
    columns, width, height = min(layers, 3), 400, 280
    figure = charts.new_figure(columns * width, 40 + -(-layers // columns) * height, "white")
    for layer in range(layers):
        left, top = layer % columns * width, 40 + layer // columns * height
        box = left + 64, top + 24, left + width - 16, top + height - 48
        axes = charts.add_axes(figure, box, "position of the query", "living keys before it")
        axes.yaxis.set_label_coords((left + 14 - box[0]) / (box[2] - box[0]), 0.5)
        axes.set_title(f"layer {layer}", size=13, color=charts.INK, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        position = 1 + np.arange(all_dropped[0].living.shape[1])
        axes.plot(position, position, color=charts.SOFT, linewidth=1, linestyle="dashed", label="all")
        for number, dropped in enumerate(all_dropped):
            colour = charts.SERIES[number % len(charts.SERIES)]
            axes.plot(position, position * dropped.living[layer], color=colour, label=dropped.name)
        ticks = [2**n for n in range(0, len(position).bit_length() + 1, 2)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=len(labels), frameon=False)
    charts.png(figure, path)


def run(options: argparse.Namespace) -> None:
    if options.workdir is None and not DEMO.exists():
        print(f"nothing is measured: there is no {DEMO}, which `make train` makes; give --workdir")
        return
    if options.plot:
        check_output(options.plot)
    workdir = options.workdir or str(DEMO)
    model = load_model(workdir)
    if options.context:
        if model.config.positions != "rotary":
            raise InputError("--context: only with rotary positions may contexts be other than the model's")
        model.config = dataclasses.replace(model.config, max_length=options.context)
    dataset = open_dataset(options.data) if options.data else data_of_run(workdir)
    check_vocabulary(model, dataset.manifest.vocab_size, dataset.path)
    windows = read_windows(dataset, "validation", model.config.max_length, options.windows)
    full = Evaluator(model, windows, None).losses([Budgets.full(model.config.num_layers, windows.length)])[0]
    print(f"{workdir}: {len(windows)} windows of {windows.length:,} tokens, loss {full.mean:.4f} nats with all keys")
    all_dropped = [drop(model, windows, *named) for named in policies(model, options.thresholds)]
    for line in table(all_dropped, full):
        print(line)
    if options.rounds:
        times = prefill_times(model, windows.inputs[0].tolist(), all_dropped[0].policy, options.rounds)
        print(
            f"a prompt of {windows.length:,} tokens, {BLOCK} at a time: {times[0]:,.0f} ms into a full cache, "
            f"{times[1]:,.0f} ms into one of as many slots without what {all_dropped[0].name} forgets"
        )
    if options.tpu:
        for line in tpu_table(json.loads(Path(options.tpu).read_text()), all_dropped[0].hidden_at, options.longer):
            print(line)
    if options.plot:
        plot(options.plot, all_dropped)
        print(options.plot)


def _thresholds(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = Parser(prog="python benchmarks/forgotten.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--workdir", help=f"a training run, or an exported folder with --data; by default {DEMO}")
    add("--data", help="dataset folder; by default the run's")
    add("--context", type=positive, help="tokens of a window; by default the model's context")
    add("--thresholds", type=_thresholds, default=[16.0, 8.0, 4.0], metavar="F,...", help="looser ones, in nats")
    add("--windows", type=positive, default=32, help="of held-out text (default: %(default)s)")
    add("--rounds", type=int, default=0, help="time taking in a prompt, the fastest of so many (default: %(default)s)")
    add("--tpu", metavar="JSON", help="estimate what TPU kernels of these schedules make of it")
    add(
        "--longer",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[],
        help="contexts beyond it, for --tpu",
    )
    add("--plot", help="PNG to write")
    options = parser.parse_args()
    run_to_the_end(lambda: run(options), "the same command begins anew")


if __name__ == "__main__":
    main()
