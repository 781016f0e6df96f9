"""What a program communicates: which chips take part in each collective, over which network, and for how long.

The estimate: a ring algorithm over all links that a group can use at once, at the published speed of a link, without
latency. Between slices the compiler sends a chip's part to its host, at the chip's share of the host's network.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.plan.hlo import Instruction, Operation
from launch.slices import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_PAIRS = re.compile(r"\{(\d+(?:,\d+)*)\}")
_IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?(?:=(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one chip sees it."""

    kind: str
    axes: str  # of the mesh, along which the group's chips lie, such as "data+fsdp"
    size: int  # chips of a group, or slices
    network: str  # "ICI" within a slice, "DCN" between slices
    bytes: int  # of the whole array: gathered, reduced, or sent
    times: float  # per step
    milliseconds: float  # each, estimated
    shapes: tuple[tuple[int, ...], ...]  # of the results on one chip


class Network:
    """The chips of a mesh: where the program's device ids are on it, and on the torus of their slice."""

    def __init__(self, mesh_shape: dict[str, int], devices: Any, topology: Topology, slices: int) -> None:
        """`devices`: array of the mesh's devices. A program for several slices numbers those of one slice."""
        self.topology, self.slices, self.axes = topology, slices, tuple(mesh_shape)
        first, *rest = mesh_shape.values()
        self.shape = (first // slices, *rest)
        self.coords = [tuple(device.coords) for device in devices.reshape(-1)[: math.prod(self.shape)]]

    def collectives(self, operation: Operation) -> list[Collective]:
        """Those that an operation does; its end, where it is asynchronous, counts as none."""
        inside = (i for i in operation.everything() if not i.opcode.endswith(("-done", "-update")))
        found = [self._collective(i, operation) for i in inside]
        return [collective for collective in found if collective is not None]

    def _collective(self, instruction: Instruction, operation: Operation) -> Collective | None:
        kind = instruction.opcode.removesuffix("-start")
        results = instruction.arrays
        if kind == "send" and (transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)):
            kind, size = transfer[1].lower().replace("_", "-"), results[0].bytes
            ms = 1e3 * _moved(kind, self.slices) * size / self.topology.chip.dcn_bandwidth
            return Collective(kind, "data", self.slices, "DCN", size, operation.times, ms, (results[0].shape,))
        if kind not in KINDS:
            return None
        if instruction.opcode == "all-gather-start":  # its operands, then its results
            results = results[len(results) // 2 :]
        elif instruction.opcode == "collective-permute-start":  # operand, result, flags
            results = results[1:2]
        size = sum(array.bytes for array in results)
        names = operation.instruction.name, *operation.instruction.called()
        if any(name.startswith("all-reduce-scatter") for name in names):
            kind = "reduce-scatter"  # the compiler fuses one from an all-reduce and a slice of it
        elif kind == "reduce-scatter":
            size *= len(self.group(instruction.text))
        group = self.group(instruction.text)
        ms = 1e3 * _moved(kind, len(group)) * size / (self.links(group) * self.topology.chip.link_bandwidth)
        shapes = tuple(array.shape for array in results)
        return Collective(kind, self.along(group), len(group), "ICI", size, operation.times, ms, shapes)

    def group(self, text: str) -> list[int]:
        """The device ids of a collective's first group, from its attributes."""
        if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
            return [int(n) for n in _PAIRS.findall(pairs[0])[0].split(",")]
        return replica_groups(text, len(self.coords))[0]

    def along(self, group: Sequence[int]) -> str:
        """The axes of the mesh along which the chips of a group differ."""
        positions = np.unravel_index(group, self.shape)
        return "+".join(axis for axis, at in zip(self.axes, positions, strict=True) if len(set(at.tolist())) > 1)

    def links(self, group: Sequence[int]) -> int:
        """Links over which a chip can send at once: along each side of the torus that the group spans, two where the
        side is a ring and all of it takes part, one on a line, whose ends have no more.
        """
        count = 0
        for side, wraps, at in zip(
            self.topology.shape, self.topology.wraps, zip(*(self.coords[n] for n in group), strict=True), strict=False
        ):
            if len(set(at)) > 1:
                count += 2 if wraps and len(set(at)) == side else 1
        return max(count, 1)


def replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """The groups of a collective, which HLO writes in three forms: listed, as a transposed iota, as axes of a mesh.

    Raises:
      ValueError: there are none, or they are in no such form.
    """
    found = re.search(r"replica_groups=(.*?)(?:, \w+=(?!\()|$)", text)
    groups = found[1] if found else ""
    if iota := _IOTA.match(groups):
        rows, columns = int(iota[1]), int(iota[2])
        return _iota(iota[3], iota[4]).reshape(rows, columns).tolist()
    if mesh := _MESH.match(groups):
        sizes = {m[1]: int(m[4]) for m in _AXIS.finditer(mesh[1])}
        ids = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes.values()))
        return _along_axes(ids, sizes, mesh[4])
    if groups.startswith("{{"):
        return [[int(n) for n in group.split(",")] for group in _PAIRS.findall(groups)]
    if groups in ("", "{}"):
        return [list(range(num_devices))]
    raise ValueError(f"replica_groups={groups!r} are in no known form")


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in permutation.split(",")]) if permutation else ids).reshape(-1)


def _along_axes(ids: np.ndarray, sizes: dict[str, int], named: str) -> list[list[int]]:
    """Groups along named axes of a mesh, or along parts of an axis: 'x':(2)4 is 4 long, inside of 2."""
    shape: list[int] = []
    grouped: list[int] = []
    parts = {m[1]: (int(m[2] or 1), int(m[3] or sizes[m[1]])) for m in _AXIS.finditer(named)}
    for axis, size in sizes.items():
        before, part = parts.get(axis, (size, 1))
        if axis in parts:
            grouped.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    grid = np.moveaxis(ids.reshape(shape), grouped, range(-len(grouped), 0))
    return grid.reshape(-1, math.prod(shape[n] for n in grouped)).tolist()


def _moved(kind: str, members: int) -> float:
    """How often a chip sends the whole array in a ring of so many members."""
    if kind in ("collective-permute", "one-to-one"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (members - 1) / members
