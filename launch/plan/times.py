"""How long a step takes, by part: an estimate from what the compiler says of its program.

Operations of XLA's by the compiler's cycles; Pallas kernels by their schedule, a cycle for each bundle, or by what they
read and write of HBM where that takes longer; collectives by their bytes over the links. What the compiler gives no
cycles for (asynchronous copies, for one) counts as none.

A collective is hidden by what the schedule puts between its start and its end, and by nothing else: the program's text
is in the order in which the chip runs it. Links serve one collective at a time, so no work hides two.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.plan.collectives import Collective, Network
from launch.plan.hlo import Operation, Program
from launch.plan.schedule import kernel_cycles
from launch.slices import Generation

MOVES = {"copy", "transpose", "reshape", "pad", "slice", "broadcast", "bitcast", "parameter", "constant", "tuple"}
MOVES |= {"dynamic-slice", "dynamic-update-slice", "get-tuple-element", "concatenate", "iota", "convert", "fusion"}


@dataclasses.dataclass
class Times:
    """Of one step on one chip."""

    milliseconds: dict[str, float]  # by part; of collectives, what the chip waits for
    collectives: list[Collective]

    @property
    def hidden(self) -> float:
        """Milliseconds of collectives beside other work."""
        return sum(c.times * c.milliseconds for c in self.collectives) - self.milliseconds.get("collectives", 0.0)


def step_times(
    program: Program,
    operations: Sequence[Operation],
    network: Network,
    dump: Path,
    part_of: Callable[[Operation], str] | None = None,
) -> Times:
    """The times of `operations`; `part_of` names a part of the step, by default one of a train step.

    `dump` is the folder of the kernels' schedules.
    """
    part_of = part_of or part_of_training
    chip = network.topology.chip
    parts: dict[str, float] = collections.defaultdict(float)
    found: list[Collective] = []
    under_way: dict[str, float] = {}  # collectives that have started, and what of each is still to come
    calls: dict[str, list[str]] = collections.defaultdict(list)
    for operation in operations:
        if body := kernel_body(operation):
            calls[body].append(operation.instruction.name)
    for operation in operations:
        milliseconds = 1e3 * operation.instruction.cycles / chip.clock
        if body := kernel_body(operation):
            cycles = kernel_cycles(dump, calls[body], body) / chip.cores
            milliseconds = 1e3 * max(cycles / chip.clock, _hbm_seconds(program, operation, chip))
        parts[part_of(operation)] += operation.times * milliseconds
        _hide(under_way, milliseconds)
        here = network.collectives(operation)
        waited = sum(c.milliseconds for c in here)
        if here and operation.instruction.opcode.endswith("-start"):
            under_way[operation.instruction.name], waited = waited, 0.0
        elif operation.instruction.opcode.endswith("-done"):
            waited += sum(under_way.pop(name, 0.0) for name in operation.instruction.operands())
        parts["collectives"] += operation.times * waited
        found += here
    return Times(dict(parts), found)


def _hide(under_way: dict[str, float], milliseconds: float) -> None:
    """Takes so long off the collectives that have started, the first one first."""
    for name, left in under_way.items():
        hidden = min(left, milliseconds)
        under_way[name] = left - hidden
        milliseconds -= hidden


def part_of_training(operation: Operation) -> str:
    """Which part of a train step an operation belongs to, by what it computes and where it was traced."""
    if operation.flops:
        return "matmuls"
    if kernel_body(operation):
        return "attention kernel" if operation.instruction.name.startswith("selective_att") else "other kernels"
    where = operation.instruction.op_name
    if "jvp(" not in where:
        return "optimizer"
    if {i.opcode for i in operation.everything()} <= MOVES:
        return "data movement"
    return "elementwise in layers" if "/layer/" in where else "loss and embedding"


def kernel_body(operation: Operation) -> str:
    """The base64 of a Pallas kernel's program; empty if it is none."""
    found = re.search(r'"body":"([^"]+)"', operation.instruction.text)
    return found[1] if found else ""


def _hbm_seconds(program: Program, operation: Operation, chip: Generation) -> float:
    """What a kernel reads and writes of HBM, each array once, at the published bandwidth; of one that it updates in
    place, what it writes is taken to be little beside what it reads.
    """
    instruction = operation.instruction
    operands = [program.instructions[name].arrays[:1] for name in dict.fromkeys(instruction.operands())]
    results = [a for n, a in enumerate(instruction.arrays) if n not in instruction.in_place]
    moved = sum(a.bytes for arrays in (results, *operands) for a in arrays if a.space == 0)
    return moved / chip.hbm_bandwidth
