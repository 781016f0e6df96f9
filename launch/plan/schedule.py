"""What a Pallas kernel costs by the TPU compiler's own schedule of it.

XLA's text gives no cycles for such kernels. With `environment` the compiler writes the final VLIW programs: one bundle
takes at least one cycle, so the bundles of the region that runs per tile, times the tiles, and what remains of the
program, times the grid's steps, are a lower bound that is close where the schedule is the limit.
"""

import base64
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

# The kernels of a program, as the compiler names them, and which of their large regions are tiles, in program order.
KERNELS = {
    "selective_attention_forward": ("diagonal", "tile"),
    "selective_attention_backward": ("diagonal", "tile"),
    "splash_mha_fwd": ("tile",),
    "splash_mha_dkv": ("tile",),
    "splash_mha_dq": ("tile",),
}
LISTED = {"selective_attention_backward"}  # which have a step of the grid only for tiles that are visited


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of a kernel's program that runs as a whole."""

    bundles: int
    busy: dict[str, float]  # share of a slot's capacity that is used
    spills: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's program: what runs for a whole tile, for one on the diagonal, per block and per step of the grid."""

    tile: Region
    diagonal: Region
    ends: int  # bundles of the starts and ends of blocks, each of which runs once a block of queries or of keys
    other: int  # bundles of a grid step outside of all these, at most: its pipeline
    rare: tuple[Region, ...] = ()  # what else uses the MXU, in program order: tiles of which only a part runs, first

    def cycles(self, query_blocks: int, key_blocks: int, start_blocks: float = 0.0, *, every: bool = True) -> float:
        """Of the grid of one sequence and head group, causal, one core, no key forgotten.

        `start_blocks` is how many key blocks come before the first query block; where queries are a chunk of the
        sequence, the mean over the chunks. `every`: whether the grid has a step for tiles above the diagonal too, in
        which nothing is done.
        """
        whole = query_blocks * start_blocks + query_blocks * (query_blocks - 1) / 2
        steps = query_blocks * key_blocks if every else whole + key_blocks - start_blocks
        tiles = whole * self.tile.bundles + query_blocks * self.diagonal.bundles
        return tiles + max(query_blocks, key_blocks) * self.ends + steps * self.other


def environment(folder: str | Path | None = None, passes: str = ".*final_.*") -> dict[str, str]:
    """Variables for a process that compiles for TPUs without one, and writes schedules into `folder` if there is one.

    `passes` is a pattern of what to write. libtpu reads these once, when JAX first loads it, so that every compilation
    needs a process of its own.
    """
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={passes}"
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": dump if folder else "",
    }


def kernel_cycles(folder: Path, calls: Sequence[str], body: str) -> float:
    """Cycles of one call of a kernel on one core, from the schedule in `folder` and its program in Mosaic's bytecode.

    `calls` are the names of all calls of the same program: the compiler writes the schedule of some of them.

    An attention kernel, whose grid is (sequences, groups of heads, blocks of queries, blocks of keys), runs the tiles
    below the diagonal; the mean over chunks where the queries are one chunk of the keys' sequence. Of any other kernel
    all of the program runs in each step of the grid.

    Raises:
      ValueError: there is no schedule of any of them.
    """
    steps = grid(body)
    call = next((call for call in calls if list(folder.glob(f"*-{call}-*final_bundles.txt"))), calls[0])
    name = call.split(".", 1)[0]
    if name in KERNELS and len(steps) == 4:
        batch, groups, query_blocks, key_blocks = steps
        schedule = read_schedule(folder, call, name)
        start, every = (key_blocks - query_blocks) / 2, name not in LISTED
        return batch * groups * schedule.cycles(query_blocks, key_blocks, start, every=every)
    return math.prod(steps) * _regions(*_files(folder, call))[0]


def bundles(folder: Path, kernel: str) -> int:
    """Bundles of a kernel's whole program, which is what a step of its grid takes at most.

    Raises:
      ValueError: there is no schedule of it.
    """
    return _regions(*_files(folder, kernel))[0]


def grid(body: str) -> tuple[int, ...]:
    """The grid of a Pallas kernel, from the base64 of its program in the text of a compiled step.

    Of a kernel of LISTED, the number of whose steps is only known when it runs: sequences, groups of heads, blocks of
    queries and blocks of keys.

    Raises:
      ValueError: it says none.
    """
    from jaxlib.mlir import ir
    from jaxlib.mosaic.python import tpu

    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        text = str(ir.Module.parse(base64.b64decode(body)))
    found = re.search(r"iteration_bounds = array<i64: ([-\d, ]+)>", text)
    if found is None:
        raise ValueError("a Pallas kernel of the program does not say its grid; is this the jaxlib of constraints.txt?")
    sides = tuple(int(n) for n in found[1].split(","))
    if sides[-1] > 0:
        return sides
    batch, groups, _ = sides
    query_blocks, _, listed = re.findall(r"memref<(\d+)xi32, #tpu.memory_space<smem>>", text)[:3]
    return batch, groups, int(query_blocks), int(listed) // (batch * int(query_blocks)) - 1


def read_schedule(folder: Path, kernel: str, name: str) -> Schedule:
    """The schedule of the kernel `name` (one of KERNELS), as the program calls it `kernel` (a pattern of files).

    Raises:
      ValueError: there is none, or it has no region that looks like a tile.
    """
    total, regions, ends = _regions(*_files(folder, kernel))
    tiles = dict(zip(KERNELS[name], regions, strict=False))
    if "tile" not in tiles:
        raise ValueError(f"the schedule of {kernel} has {len(regions)} regions that use the MXU; no tile among them")
    other = total - sum(region.bundles for region in regions) - ends
    return Schedule(tiles["tile"], tiles.get("diagonal", tiles["tile"]), ends, other, tuple(regions[len(tiles) :]))


def _files(folder: Path, kernel: str) -> tuple[Path, Path]:
    """A kernel's program and its table of slots."""
    programs = [p for p in sorted(folder.glob(f"*-{kernel}[-.]*final_bundles.txt")) if "analysis" not in p.name]
    tables = sorted(folder.glob(f"*-{kernel}[-.]*final_hlo-static-per-bundle-utilization.txt"))
    if not programs or not tables:
        raise ValueError(f"the compiler wrote no schedule of {kernel}")
    return programs[0], tables[0]


def _regions(program: Path, table: Path) -> tuple[int, list[Region], int]:
    """Bundles of a kernel's whole program, its innermost regions that use the MXU, in program order, and the bundles
    of the other conditional regions beside them. A start of a block can be part of the only tile that it can meet.
    """
    capacities, uses = re.split(r"== UTILIZATION:\s*", table.read_text())
    slots, capacity = (line.replace(",", " ").split() for line in capacities.strip().splitlines()[-2:])
    use = [[int(n) for n in line.split()] for line in uses.strip().splitlines()]
    address, starts, spans = 0, {}, set()
    for line in program.read_text().splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:", line):
            address = int(found[1], 16)
        for kind, name in re.findall(r"(Start|End) region (\d+)", line):
            if kind == "Start":
                starts[name] = address
            elif name in starts:
                spans.add((starts[name], address))
    using = {}  # the spans that use the MXU, and how much they use of everything
    for start, end in sorted(spans):
        rows = [row for row in use[start : end + 1] if len(row) == len(slots)]
        total = dict(zip(slots, map(sum, zip(*rows, strict=True)), strict=True)) if rows else {}
        if total.get("MXU"):
            using[start, end] = {slot: (n, n / len(rows)) for slot, n in total.items()}
    regions, tiles = [], []
    for (start, end), total in using.items():
        if not any(s != (start, end) and start <= s[0] and s[1] <= end and s[1] - s[0] > 100 for s in using):
            busy = {slot: total[slot][1] / int(n) for slot, n in zip(slots, capacity, strict=True)}
            regions.append(Region(end - start + 1, busy, total["VSTORE:SPILL"][0]))
            tiles.append((start, end))
    return address + 1, regions, _bundles_beside(tiles, spans)


def _bundles_beside(tiles: list[tuple[int, int]], spans: set[tuple[int, int]]) -> int:
    """Bundles of the outermost spans that share the innermost one around all tiles with them."""

    def inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
        return outer[0] <= inner[0] and inner[1] <= outer[1]

    around = [span for span in spans if all(inside(tile, span) for tile in tiles)]
    if not tiles or not around:
        return 0
    body = min(around, key=lambda span: span[1] - span[0])
    beside = [
        s for s in spans if inside(s, body) and s != body and not any(inside(t, s) or inside(s, t) for t in tiles)
    ]
    outermost = [s for s in beside if not any(inside(s, other) and s != other for other in beside)]
    return sum(end - start + 1 for start, end in outermost)
