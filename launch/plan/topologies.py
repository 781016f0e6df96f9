"""TPU slices by their public names: one table, with what the vendor publishes of each generation.

Sources: the "TPU v4", "v5e", "v5p" and "v6e" pages of Cloud TPU's documentation, except where a comment says otherwise.
"""

import dataclasses
import math
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip; a JAX device is a whole chip."""

    cores: int  # TensorCores that share one device's work
    clock: float  # Hz
    peak_flops: float  # FLOP/s in bfloat16
    hbm_bytes: float  # that a program may use: by the compiler, when a program needs more
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one ICI link in one direction
    dcn_bandwidth: float  # bytes/s of one chip's share of its host's network
    names_count_cores: bool  # v4-8 has 8 TensorCores, v5e-8 has 8 chips
    wraps_from: int  # a side of the torus is closed from this length on (3D: where all sides are)
    shapes: tuple[tuple[int, ...], ...]  # of the slices on offer


CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)),
    *((4, 8, 8), (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 16, 16)),
)
SQUARES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
GENERATIONS = {
    # The clocks of v4, v5p and v5e are peak_flops over the FLOPs that their MXUs, 128 x 128 and four to a core, do in a
    # cycle. v6e's is not to be had like that: by the published two MXUs of 256 x 256 it would have to run at 3.5 GHz.
    # At 1.75 GHz its peak is 524,600 FLOPs a cycle, of which the compiler's cycles for a matmul of 4,096 cubed use 87%,
    # as they do on v4 (v5p and v5e: 96%): tests/launch/plan/test_generations.py.
    # The DCN share of v4 is not published per chip: v5p's is assumed.
    "v4": Generation(2, 1.05e9, 275e12, 30.75 * GIB, 1228e9, 50e9, 6.25e9, True, 4, CUBES),
    "v5p": Generation(2, 1.75e9, 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, True, 4, CUBES),
    "v5e": Generation(1, 1.5e9, 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, False, 16, SQUARES),
    "v6e": Generation(1, 1.75e9, 918e12, 31.25 * GIB, 1640e9, 100e9, 12.5e9, False, 16, SQUARES),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, its generation and the chips along each side."""

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each side is a ring. In 3D all sides are, from 4 x 4 x 4 up, or none."""
        sides = tuple(side >= self.chip.wraps_from for side in self.shape)
        return sides if len(self.shape) == 2 else (all(sides),) * 3

    def describe(self, num_slices: int) -> Any:
        """JAX's description of the slices, whose `devices` programs can be compiled for; needs libtpu."""
        from jax.experimental import topologies

        options: dict[str, Any] = {"num_slices": num_slices}
        if len(self.shape) == 3:
            options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "wrap": self.wraps}
        elif num_slices == 1:
            options = {}
        sides = "x".join(map(str, self.shape))
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{self.generation}:{sides}", **options)


def _name(generation: str, shape: tuple[int, ...]) -> str:
    return f"{generation}-{math.prod(shape) * (2 if GENERATIONS[generation].names_count_cores else 1)}"


TOPOLOGIES = {
    _name(g, shape): Topology(_name(g, shape), g, shape) for g in GENERATIONS for shape in GENERATIONS[g].shapes
}


def find(name: str) -> Topology:
    """The slice of a public name, such as v4-32 or v5litepod-16.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    found = TOPOLOGIES.get(name.replace("v5litepod", "v5e"))
    if found is None:
        raise ValueError(f"--topology: {name!r} is not a slice; choose one of {', '.join(TOPOLOGIES)}")
    return found
