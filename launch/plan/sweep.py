"""All sensible meshes of a topology, compiled and ranked by estimated step time."""

from typing import Any

from ml_collections import ConfigDict

from launch.plan.estimate import Planner, changed
from launch.plan.meshes import sensible_meshes
from launch.plan.several import compile_all
from launch.slices import Topology
from trainer.errors import ConfigError
from trainer.mesh import AXES


def sweep(
    config: ConfigDict, topology: Topology, slices: int, fixed: dict[str, int], planner: Planner
) -> list[dict[str, Any]]:
    """The plans of all sensible meshes, the fastest first, those that do not fit last.

    Raises:
      ConfigError: there is no sensible mesh.
    """
    meshes = sensible_meshes(config, topology, slices, fixed)

    def one(mesh: dict[str, int]) -> dict[str, Any]:
        try:
            made = planner(changed(config, {f"mesh.{axis}": mesh[axis] for axis in AXES}), topology, slices)
        except (ConfigError, RuntimeError) as error:
            made = {"fits": False, "mesh": mesh, "error": " ".join(str(error).split())[:200]}
        made.pop("hlo", None)
        return made

    made = compile_all(one, meshes, "meshes")
    return sorted(made, key=lambda plan: (not plan["fits"], plan.get("step_ms", 0.0)))
