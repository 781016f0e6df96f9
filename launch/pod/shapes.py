"""What the slice types are: hosts, chips, topology, and the names that Cloud TPU and GKE give them."""

import dataclasses

_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
          1536: "8x8x12", 2048: "8x8x16", 4096: "8x16x16"}  # fmt: skip
_PLANES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_FAMILIES = {
    "v4": (_CUBES, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5p": (_CUBES, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v5litepod": (_PLANES, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v6e": (_PLANES, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One slice."""

    hosts: int
    chips: int
    topology: str
    runtime: str  # the VM image
    gke_accelerator: str


def find(name: str) -> Shape | None:
    """The shape of a type as v4-32: v4 and v5p count TensorCores, two a chip; v5e and v6e count chips."""
    family, _, size = name.rpartition("-")
    if family not in _FAMILIES or not size.isascii() or not size.isdigit():
        return None
    topologies, runtime, accelerator = _FAMILIES[family]
    if int(size) not in topologies or size != str(int(size)):
        return None
    cores = topologies is _CUBES
    chips = int(size) // 2 if cores else int(size)
    # Up to eight chips of v5e and v6e are one host; larger slices are made of hosts with four.
    hosts = 1 if not cores and chips <= 8 else chips // 4
    return Shape(hosts, chips, topologies[int(size)], runtime, accelerator)
