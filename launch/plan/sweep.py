"""All sensible meshes of a topology, compiled and ranked by estimated step time."""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from ml_collections import ConfigDict
from tqdm import tqdm

from launch.plan import topologies
from launch.plan.estimate import Planner, changed
from trainer.errors import ConfigError
from trainer.mesh import AXES
from trainer.state import model_config

LARGEST_TENSOR = 8  # parts; more leave a chip too little of a matmul
TOKENS_OF_CONTEXT = 1024  # at least, on each chip of a split sequence
Result = TypeVar("Result")


def workers() -> int:
    """How many programs to compile at once: a compilation uses about a core and a few GiB."""
    return min(os.cpu_count() or 1, 8)


def sensible_meshes(config: ConfigDict, topology_name: str, slices: int, fixed: dict[str, int]) -> list[dict[str, int]]:
    """Sizes of the axes for each mesh worth compiling.

    `tensor` divides the key/value heads and is at most 8; `context` leaves a chip 1,024 tokens; `data` and `fsdp` share
    the rest in every way that gives each chip a sequence. `fixed` sizes stay as they are.

    Raises:
      ConfigError: there is none.
    """
    model, chips = model_config(config), topologies.find(topology_name).num_chips * slices
    choices = {
        "fsdp": [n for n in _divisors(chips // slices) if model.d_model % n == 0],
        "context": [n for n in _divisors(chips) if n == 1 or config.context_length // n >= TOKENS_OF_CONTEXT],
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
            f"--topology={topology_name}: no mesh of {chips} chips divides batch_size={config.batch_size} and "
            f"num_kv_heads={model.num_kv_heads}; change --config.batch_size or --mesh, or choose another slice"
        )
    return meshes


def sweep(
    config: ConfigDict, topology_name: str, slices: int, fixed: dict[str, int], planner: Planner
) -> list[dict[str, Any]]:
    """The plans of all sensible meshes, the fastest first, those that do not fit last.

    Raises:
      ConfigError: there is no sensible mesh.
    """
    meshes = sensible_meshes(config, topology_name, slices, fixed)

    def one(mesh: dict[str, int]) -> dict[str, Any]:
        try:
            made = planner(changed(config, {f"mesh.{axis}": mesh[axis] for axis in AXES}), topology_name, slices)
        except (ConfigError, RuntimeError) as error:
            made = {"fits": False, "mesh": mesh, "error": " ".join(str(error).split())[:200]}
        made.pop("hlo", None)
        return made

    made = compile_all(one, meshes, f"{len(meshes)} meshes")
    return sorted(made, key=lambda plan: (not plan["fits"], plan.get("step_ms", 0.0)))


def compile_all(one: Callable[[Any], Result], of: Sequence[Any], title: str) -> list[Result]:
    """`one(x)` for each x, several at once, with a progress bar; in the order of `of`."""
    with ThreadPoolExecutor(workers()) as pool:
        futures = [pool.submit(one, x) for x in of]
        for _ in tqdm(as_completed(futures), total=len(futures), desc=f"Compiling {title}", unit="", ncols=79):
            pass
        return [future.result() for future in futures]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
