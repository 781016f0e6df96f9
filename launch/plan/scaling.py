"""How the estimate scales over several topologies: the same batch (strong), and as much for each chip (weak)."""

from collections.abc import Sequence

from launch.plan.meshes import check_mesh
from launch.plan.planner import Planner
from launch.plan.result import DoesNotFit, ScalingRow, refusal
from launch.plan.several import compile_all
from launch.slices import Topology
from trainer.errors import ConfigError
from trainer.settings import Settings, changed


def scale(config: Settings, topologies: Sequence[Topology], slices: int, planner: Planner) -> list[ScalingRow]:
    """The rows of weak scaling, then those of strong.

    The weak batch is the config's on the first topology. What both kinds share is compiled once.
    """
    chips = [topology.num_chips * slices for topology in topologies]
    weak = [(topology, config.batch_size * n // chips[0]) for topology, n in zip(topologies, chips, strict=True)]
    strong = [(topology, config.batch_size) for topology in topologies]
    jobs = list(dict.fromkeys(weak + strong))

    def one(job: tuple[Topology, int]) -> ScalingRow:
        topology, batch_size = job
        try:
            candidate = changed(config, {"batch_size": batch_size})
            check_mesh(candidate, topology, slices)
            made = planner(candidate, topology, slices)
        except ConfigError as error:
            return {"error": str(error)}
        if isinstance(made, DoesNotFit) or not made.fits:
            return {"error": refusal(made, "does not fit")}
        return {
            "step_ms": made.step_ms,
            "mfu": made.mfu,
            "tokens_per_second": made.tokens_per_second,
            "headroom": made.headroom,
            "step_ms_by_part": made.step.step_ms_by_part,
        }

    made = dict(zip(jobs, compile_all(one, jobs, "programs"), strict=True))
    rows = []
    for kind, points in (("weak", weak), ("strong", strong)):
        base = 0.0
        for (topology, batch_size), n in zip(points, chips, strict=True):
            row: ScalingRow = {"scaling": kind, "topology": topology.name, "chips": n, "batch_size": batch_size}
            row |= made[topology, batch_size]
            if "tokens_per_second" in row:
                base = base or row["tokens_per_second"] / n
                row["efficiency"] = row["tokens_per_second"] / n / base
            rows.append(row)
    return rows
