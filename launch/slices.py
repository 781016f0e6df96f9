"""TPU slices by their public names: one table, of what the planner and the launcher need.

    python3 launch/slices.py v4-32    # as assignments of a shell; exit code 2 for a name that is not in the table

Imports nothing that has to be installed. Sources: the "TPU v4", "v5e", "v5p" and "v6e" pages of Cloud TPU's
documentation, except where a comment says otherwise.
"""

import dataclasses
import math
import sys
from typing import Any

GIB = 2**30
Sides = tuple[int, ...]  # chips along each side of a slice


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip; a JAX device is a whole chip."""

    cores: int  # TensorCores that share one device's work
    clock: float  # Hz
    device_kind: str  # JAX's name of it, by which trainer.metrics.flops knows its peak
    hbm_bytes: float  # that a program may use: by the compiler, when a program needs more
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one ICI link in one direction
    dcn_bandwidth: float  # bytes/s of one chip's share of its host's network
    names_count_cores: bool  # v4-8 has 8 TensorCores, v5e-8 has 8 chips
    chips_of_one_host: int  # the most that a slice of a single host has; a host of several has four
    wraps_from: int  # a side of the torus is closed from this length on (3D: where all sides are)
    shapes: tuple[Sides, ...]  # of the slices on offer
    accelerator: str  # in the name of a slice's accelerator type on Cloud TPU
    runtime: str  # the VM image on Cloud TPU
    gke_accelerator: str  # the label of a node on GKE


CUBES: tuple[Sides, ...] = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)),
    *((4, 8, 8), (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 16, 16)),
)
SQUARES: tuple[Sides, ...] = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# names_count_cores, chips_of_one_host, wraps_from, shapes
_THREE_SIDES = (True, 4, 4, CUBES)
_TWO_SIDES = (False, 8, 16, SQUARES)
GENERATIONS = {
    # The clocks of v4, v5p and v5e are the peak over the FLOPs that their MXUs, 128 x 128 and four to a core, do in a
    # cycle. v6e's is not to be had like that: by the published two MXUs of 256 x 256 it would have to run at 3.5 GHz.
    # At 1.75 GHz its peak is 524,600 FLOPs a cycle, of which the compiler's cycles for a matmul of 4,096 cubed use 87%,
    # as they do on v4 (v5p and v5e: 96%): tests/launch/plan/test_generations.py.
    # The DCN share of v4 is not published per chip: v5p's is assumed.
    "v4": Generation(
        *(2, 1.05e9, "TPU v4", 30.75 * GIB, 1228e9, 50e9, 6.25e9),
        *(*_THREE_SIDES, "v4", "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    ),
    "v5p": Generation(
        *(2, 1.75e9, "TPU v5", 95.74 * GIB, 2765e9, 100e9, 6.25e9),
        *(*_THREE_SIDES, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice"),
    ),
    "v5e": Generation(
        *(1, 1.5e9, "TPU v5 lite", 15.75 * GIB, 819e9, 50e9, 3.125e9),
        *(*_TWO_SIDES, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    ),
    "v6e": Generation(
        *(1, 1.75e9, "TPU v6 lite", 31.25 * GIB, 1640e9, 100e9, 12.5e9),
        *(*_TWO_SIDES, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    ),
}
# Dollars per chip and hour on demand in the cheapest region of the United States, and when Google's page
# "Cloud TPU pricing" was last seen quoted so. Spot and reserved slices cost less. No copy of the page that has v5p was
# found: three price tables of other projects agree on it, and have v4 and v5e as here.
LIST_PRICES = {"v4": (3.22, "2025-01"), "v5p": (4.20, "2025"), "v5e": (1.20, "2026-09"), "v6e": (2.70, "2026-08")}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its generation and the chips along each side."""

    generation: str
    shape: Sides

    @property
    def name(self) -> str:
        """Such as v4-32 or v5e-16."""
        return f"{self.generation}-{self._size}"

    @property
    def accelerator_type(self) -> str:
        """The name on Cloud TPU, such as v5litepod-16."""
        return f"{self.chip.accelerator}-{self._size}"

    @property
    def chip(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def list_price(self) -> tuple[float, str]:
        """Dollars per chip and hour on demand, 0 where that is not known, and of when."""
        return LIST_PRICES.get(self.generation, (0.0, ""))

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_hosts(self) -> int:
        return 1 if self.num_chips <= self.chip.chips_of_one_host else self.num_chips // 4

    @property
    def sides(self) -> str:
        """The shape as Cloud TPU and GKE write it, such as 2x2x4."""
        return "x".join(map(str, self.shape))

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each side is a ring. In 3D all sides are, from 4 x 4 x 4 up, or none."""
        sides = tuple(side >= self.chip.wraps_from for side in self.shape)
        return sides if len(self.shape) == 2 else (all(sides),) * 3

    def describe(self, num_slices: int) -> Any:
        """JAX's description of the slices, whose `devices` programs can be compiled for; needs libtpu."""
        from jax.experimental import topologies

        options: dict[str, object] = {"num_slices": num_slices}
        if len(self.shape) == 3:
            options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "wrap": self.wraps}
        elif self.num_chips == 1:
            options |= {"chips_per_host_bounds": (1, 1, 1)}
        elif num_slices == 1:
            options = {}
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{self.generation}:{self.sides}", **options)

    @property
    def _size(self) -> int:
        return self.num_chips * (2 if self.chip.names_count_cores else 1)


TOPOLOGIES = {
    topology.name: topology
    for topology in (Topology(name, shape) for name, chip in GENERATIONS.items() for shape in chip.shapes)
}


def find(name: str) -> Topology:
    """The slice of a public name, such as v4-32, v5e-16 or v5litepod-16.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    found = TOPOLOGIES.get(name) or {t.accelerator_type: t for t in TOPOLOGIES.values()}.get(name)
    if found is None:
        raise ValueError(f"{name!r} is not a slice; choose one of {', '.join(TOPOLOGIES)}")
    return found


def assignments(topology: Topology) -> str:
    """What launch/pod asks of a slice, as lines that a shell evaluates."""
    values = {
        "TYPE": topology.accelerator_type,
        "HOSTS": topology.num_hosts,
        "CHIPS": topology.num_chips,
        "TOPOLOGY": topology.sides,
        "RUNTIME": topology.chip.runtime,
        "GKE_ACCELERATOR": topology.chip.gke_accelerator,
    }
    return "\n".join(f"{name}={value}" for name, value in values.items())


if __name__ == "__main__":
    try:
        print(assignments(find(" ".join(sys.argv[1:]))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
