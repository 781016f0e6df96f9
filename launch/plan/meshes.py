"""Which meshes a slice can have: those worth compiling, and what to say of one that it cannot have."""

import dataclasses
import itertools

from launch.slices import Topology
from trainer.errors import ConfigError
from trainer.mesh import AXES, mesh_shape
from trainer.settings import Settings

LARGEST_TENSOR = 8  # parts; more leave a chip too little of a matmul
TOKENS_OF_CONTEXT = 1024  # at least, on each chip of a split sequence


def sensible_meshes(config: Settings, topology: Topology, slices: int, fixed: dict[str, int]) -> list[dict[str, int]]:
    """Sizes of the axes for each mesh worth compiling.

    `tensor` divides the key/value heads and is at most 8; `context` leaves a chip 1,024 tokens; `data` and `fsdp` share
    the rest in every way that gives each chip a sequence. `fixed` sizes stay as they are.

    Raises:
      ConfigError: there is none.
    """
    model, chips = config.transformer, topology.num_chips * slices
    longest = config.context_length if config.corruption is None else 1  # an encoder-decoder's are not split
    choices = {
        "fsdp": [n for n in _divisors(chips // slices) if model.d_model % n == 0],
        "context": [n for n in _divisors(chips) if n == 1 or longest // n >= TOKENS_OF_CONTEXT],
        "tensor": [n for n in _divisors(chips) if n <= LARGEST_TENSOR and model.num_kv_heads % n == 0],
    }
    choices |= {axis: [size] for axis, size in fixed.items() if axis != "data" and size > 0}
    meshes = []
    for fsdp, context, tensor in itertools.product(*choices.values()):
        data, rest = divmod(chips, fsdp * context * tensor)
        rows = data * fsdp * config.accumulation
        if rest or data == 0 or data % slices or config.batch_size % rows or fixed.get("data", -1) not in (-1, data):
            continue
        meshes.append({"data": data, "fsdp": fsdp, "context": context, "tensor": tensor})
    if not meshes:
        raise ConfigError(
            f"--topology={topology.name}: no mesh of {chips} chips divides batch_size={config.batch_size} and "
            f"num_kv_heads={model.num_kv_heads}; change --config.batch_size or --mesh, or choose another slice"
        )
    return meshes


def check_mesh(config: Settings, topology: Topology, slices: int) -> None:
    """Checks that the slices can have the config's mesh.

    Raises:
      ConfigError: the mesh has other chips than the slices, or more parts of a batch than the batch has sequences. The
        message names what would do.
    """
    chips = topology.num_chips * slices
    try:
        *_, context, tensor = mesh_shape(config.mesh, chips, num_slices=slices)
    except ConfigError as error:
        raise ConfigError(f"--topology={topology.name}: {error}{_example(config, topology, slices)}") from error
    rows = chips // (context * tensor)
    if config.batch_size < rows * config.accumulation:
        raise ConfigError(
            f"--topology={topology.name}: batch_size={config.batch_size} is too small for {chips} chips: data and fsdp "
            f"split it into {rows} parts, accumulation into {config.accumulation}; choose a smaller slice, "
            f"--mesh with tensor or context, or --config.batch_size={rows * config.accumulation}"
        )


def _example(config: Settings, topology: Topology, slices: int) -> str:
    """The sensible mesh that is most like the config's, as a flag; empty if there is none."""
    asked = dataclasses.asdict(config.mesh)
    try:
        meshes = sensible_meshes(config, topology, slices, {})
    except ConfigError:
        return ""

    def unlike(mesh: dict[str, int]) -> tuple[int, int]:
        others = sum(mesh[axis] != asked[axis] for axis in ("context", "tensor"))
        return others, abs(mesh["fsdp"] - asked["fsdp"])

    mesh = min(meshes, key=unlike)
    change = [
        f"{axis}={mesh[axis]}" for axis in AXES if mesh[axis] != asked[axis] and (axis, asked[axis]) != ("data", -1)
    ]
    return f", for example --mesh={','.join(change)}" if change else ""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
