"""All sensible meshes of a topology, compiled and ranked by estimated step time."""

from launch.plan.meshes import sensible_meshes
from launch.plan.planner import Planner
from launch.plan.result import DoesNotFit, Impossible, Plan
from launch.plan.several import compile_all
from launch.slices import Topology
from trainer.errors import ConfigError
from trainer.mesh import AXES
from trainer.settings import Settings, changed


def sweep(
    config: Settings, topology: Topology, slices: int, fixed: dict[str, int], planner: Planner
) -> list[Plan | DoesNotFit | Impossible]:
    """The plans of all sensible meshes, the fastest first, those that do not fit last.

    Raises:
      ConfigError: there is no sensible mesh.
    """
    meshes = sensible_meshes(config, topology, slices, fixed)

    def one(mesh: dict[str, int]) -> Plan | DoesNotFit | Impossible:
        try:
            return planner(changed(config, {f"mesh.{axis}": mesh[axis] for axis in AXES}), topology, slices)
        except (ConfigError, RuntimeError) as error:
            return Impossible(mesh, " ".join(str(error).split())[:200])

    made = compile_all(one, meshes, "meshes")
    return sorted(made, key=lambda plan: (not plan.fits, plan.step_ms if isinstance(plan, Plan) else 0.0))
