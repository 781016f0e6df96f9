"""Reads the TPU compiler's optimised program (HLO text): what runs in a step, how often, and what it costs.

A scan's body stands once in the text; here every operation carries how often it runs.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_ARRAY = re.compile(r"\b(pred|s8|u8|bf16|f16|s16|u16|f32|s32|u32|f64)\[([\d,]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of an array in the program, as one chip holds it."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0  # 0 is HBM; others are on the chip

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str  # its type, as text
    opcode: str
    text: str  # from the opcode on

    @property
    def arrays(self) -> list[Array]:
        return arrays(self.result)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, such as jit(train_step)/jvp()/while/body/dot_general."""
        return _group(r'op_name="([^"]*)"', self.text)

    @property
    def cycles(self) -> int:
        """The compiler's estimate, per chip; 0 where it makes none."""
        return int(_group(r'"estimated_cycles":"(\d+)"', self.text) or 0)

    @property
    def in_place(self) -> set[int]:
        """Which of its results are operands that it updates."""
        aliases = _group(r"output_to_operand_aliasing=\{(.*?\))\s*\}", self.text)
        return {int(n or 0) for n in re.findall(r"\{(\d*)\}: \(", aliases)}

    def operands(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return re.findall(r"%([^\s,)]+)", self.text.split(")", 1)[0])

    def called(self) -> list[str]:
        """Computations that it runs, but for the functions of reductions."""
        found = re.findall(r"(?:calls|body|true_computation|false_computation)=%([^\s,)}]+)", self.text)
        branches = _group(r"branch_computations=\{([^}]*)\}", self.text)
        found += re.findall(r"%([^\s,]+)", branches)
        return found + (re.findall(r"to_apply=%([^\s,)]+)", self.text) if self.opcode == "call" else [])


@dataclasses.dataclass(frozen=True)
class Operation:
    """What runs on the chip as one piece: an instruction with those that are fused into it."""

    instruction: Instruction
    fused: tuple[Instruction, ...]
    times: float  # per step
    flops: float  # of its matmuls and convolutions, once, with a multiplication and an addition as two

    def everything(self) -> tuple[Instruction, ...]:
        return (self.instruction, *self.fused)


def arrays(text: str) -> list[Array]:
    """The arrays of a type, such as (f32[2,3], bf16[4])."""
    found = _ARRAY.findall(text)
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), int(space or 0)) for dtype, shape, space in found
    ]


class Program:
    """The computations of a compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
                current = self.computations[name] = []
                if line.startswith("ENTRY "):
                    self.entry = name
            elif found := _INSTRUCTION.match(line):
                current.append(_instruction(*found.groups()))

    def operations(self, scale: bool = True) -> Iterator[Operation]:
        """All that a step runs; without `scale`, each body of a loop is counted once, as the compiler's totals do."""
        return self._operations(self.entry, 1.0, scale)

    def _operations(self, computation: str, times: float, scale: bool) -> Iterator[Operation]:
        for instruction in self.computations[computation]:
            called = [name for name in instruction.called() if name in self.computations]
            if instruction.opcode == "while":
                trips = self.trip_count(instruction) if scale else 1
                yield from self._operations(called[0], times * trips, scale)
            elif instruction.opcode == "conditional":
                yield from self.taken([list(self._operations(name, times, scale)) for name in called])
            elif instruction.opcode == "call":
                yield from self._operations(called[0], times, scale)
            else:
                fused = tuple(itertools.chain.from_iterable(self._fused(name) for name in called))
                yield Operation(instruction, fused, times, self._flops(instruction) + sum(map(self._flops, fused)))

    def taken(self, branches: list[list[Operation]]) -> list[Operation]:
        """Of the branches of a conditional, whichever is the dearer: an estimate that holds for all."""
        return max(branches, key=lambda ops: sum(o.times * o.instruction.cycles for o in ops))

    def _fused(self, computation: str) -> Iterator[Instruction]:
        for instruction in self.computations[computation]:
            yield instruction
            for name in instruction.called():
                yield from self._fused(name)

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs: from its counter's first value (not 0 where the compiler has peeled one off)
        to the constant that the counter is compared with.

        Raises:
          ValueError: the condition holds no such constant.
        """
        known = _group(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known)
        condition = list(self._fused(_group(r"condition=%([^\s,)]+)", loop.text)))
        counts = [int(n) for i in condition for n in re.findall(r"^constant\((\d+)\)", i.text)]
        if not counts:
            raise ValueError(f"the trip count of {loop.name} is not a constant of its condition")
        return max(counts) - self._first_value(loop, condition)

    def _first_value(self, loop: Instruction, condition: list[Instruction]) -> int:
        """Of a loop's counter, the element of its state that the condition reads; 0 if the program computes it."""
        index = next((_group(r"index=(\d+)", i.text) for i in condition if i.opcode == "get-tuple-element"), "0")
        value = self.instructions[loop.operands()[0]]
        if value.opcode == "tuple":
            value = self.instructions[value.operands()[int(index)]]
        while value.opcode in ("copy", "bitcast"):
            value = self.instructions[value.operands()[0]]
        return int(_group(r"^constant\((\d+)\)", value.text) or 0)

    def _flops(self, instruction: Instruction) -> float:
        if instruction.opcode == "custom-call":  # a kernel with matmuls of the model says how many
            return float(_group(r'"cost_estimate":\{"flops":"(\d+)"', instruction.text) or 0)
        if instruction.opcode not in ("convolution", "dot"):
            return 0.0
        operands = [self.instructions[name].arrays[0].shape for name in instruction.operands()]
        output = instruction.arrays[0].shape
        if instruction.opcode == "dot":
            contracted = _group(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text).split(",")
            return 2.0 * math.prod(output) * math.prod(operands[0][int(n)] for n in contracted if n)
        return _convolution_flops(instruction.text, operands[0], operands[1], output)

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All, by their names."""
        return {i.name: i for i in itertools.chain.from_iterable(self.computations.values())}


def _instruction(name: str, rest: str) -> Instruction:
    if rest.startswith("("):  # a tuple's type, up to the bracket that closes it
        depth = end = 0
        for position, character in enumerate(rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                end = position
                break
        result, text = rest[: end + 1], rest[end + 2 :]
    else:
        result, text = rest.split(" ", 1)
    return Instruction(name, result, text.split("(", 1)[0], text)


def _convolution_flops(text: str, lhs: tuple[int, ...], rhs: tuple[int, ...], output: tuple[int, ...]) -> float:
    """Two per multiplication with an element that is there: the TPU compiler writes matmuls as convolutions, some of
    them with windows that lie mostly in the padding.
    """
    left, right, out = re.split("_|->", _group(r"dim_labels=(\S+?)[,\s]", text + " "))
    spatial = sorted(c for c in out if c.isdigit())
    window = _group(r"window=\{([^}]*)\}", text)

    def field(name: str, default: str) -> list[str]:
        return _group(rf"\b{name}=(\S+)", window).split("x") if f"{name}=" in window else [default] * len(spatial)

    sizes, strides, pads = field("size", "1"), field("stride", "1"), field("pad", "0_0")
    base, dilation = field("lhs_dilate", "1"), field("rhs_dilate", "1")
    pairs = 1
    for n, dim in enumerate(spatial):
        low = int(pads[n].split("_")[0])
        length = (lhs[left.index(dim)] - 1) * int(base[n]) + 1
        positions = (
            o * int(strides[n]) + w * int(dilation[n]) - low
            for o in range(output[out.index(dim)])
            for w in range(int(sizes[n]))
        )
        pairs *= sum(1 for p in positions if 0 <= p < length and p % int(base[n]) == 0)
    groups = int(_group(r"batch_group_count=(\d+)", text) or 1)
    return 2.0 * output[out.index("b")] * output[out.index("f")] * rhs[right.index("i")] * pairs / groups


def _group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
