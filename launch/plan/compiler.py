"""Compiles the trainer's own step for a slice that is not here, and measures the program: a process of its own.

    python -m launch.plan.compiler REQUEST RESULT

libtpu reads its options once, when JAX first loads it, so every compilation has a process. REQUEST and RESULT are JSON
files; `measure` writes the one and reads the other.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from launch.plan import times
from launch.plan.collectives import Collective, Network
from launch.plan.hlo import Program
from launch.plan.schedule import environment
from launch.slices import Topology, find
from trainer.errors import ConfigError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(config: ConfigDict, topology: Topology, slices: int = 1) -> dict[str, Any]:
    """What the compiler says of the train step of `config` on `slices` slices.

    Of a step that does not fit: `error`, one line; `needed_bytes`, at least; and `hbm_bytes` of the state alone.

    Raises:
      ConfigError: the mesh or the batch does not fit the slice.
      RuntimeError: compiling failed for another reason.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "config": json.loads(config.to_json()),
            "topology": topology.name,
            "slices": slices,
            "dump": f"{name}/dump",
        }
        (folder / "request").write_text(json.dumps(request))
        command = [sys.executable, "-m", "launch.plan.compiler", f"{name}/request", f"{name}/result"]
        variables = os.environ | environment(folder / "dump")
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if not (folder / "result").exists():
            raise RuntimeError(f"compiling for {topology.name} failed:\n{done.stderr[-4000:]}")
        result = json.loads((folder / "result").read_text())
    if "mistake" in result:
        raise ConfigError(result["mistake"])
    return result


def main() -> None:
    """Compiles what REQUEST asks for."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the compiler to return
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        config, topology = ConfigDict(request["config"]), find(request["topology"])
        result = _compile(config, topology, request["slices"], Path(request["dump"]))
    except ConfigError as error:
        result = {"mistake": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(result))


def _compile(config: ConfigDict, topology: Topology, slices: int, dump: Path) -> dict[str, Any]:
    import jax

    from trainer.checkpoints.manager import abstract_state
    from trainer.config import check_batch
    from trainer.loop import compile_train_step
    from trainer.mesh import make_mesh
    from trainer.state import init_state, make_optimizer

    if config.model.attention == "auto":
        config.model.attention = "pallas"  # what "auto" is on a TPU
    mesh = make_mesh(config.mesh, devices=list(topology.describe(slices).devices))
    check_batch(config, mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(jax.eval_shape(lambda: init_state(config, make_optimizer(config))), mesh)

    def per_chip(tree: Any) -> int:
        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))

    parameters, optimizer = per_chip(state.params), per_chip(state.opt_state)
    facts = {
        "mesh": dict(mesh.shape),
        "hbm_bytes": {"parameters": parameters, "optimizer": optimizer},
        "state_bytes": sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(state)),
    }
    try:
        compiled = compile_train_step(config, 0, state, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return facts | out_of_memory(str(error))
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    if memory is None or text is None or cost is None:
        raise RuntimeError("the compiler gives no account of its program; is this the libtpu that jax[tpu] pins?")
    program = Program(text)
    operations = list(program.operations())
    network = Network(dict(mesh.shape), mesh.devices, topology, slices)
    estimate = times.estimate(program, operations, network, dump)
    facts["hbm_bytes"] = {
        "parameters": parameters,
        "optimizer": optimizer,
        "batch and padding": memory.argument_size_in_bytes - parameters - optimizer,
        "results beside the state": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "activations and temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return facts | {
        "argument_bytes": memory.argument_size_in_bytes,
        "step_ms_by_part": estimate.milliseconds,
        "collectives": _rows(estimate.collectives),
        "moved_shapes": sorted({shape for c in estimate.collectives for shape in c.shapes}),
        "matmul_flops": sum(o.flops * o.times for o in operations),
        "unscaled_matmul_flops": sum(o.flops for o in program.operations(scale=False)),
        "compiler_flops": cost["flops"],
        "hlo": text,
    }


def out_of_memory(message: str) -> dict[str, Any]:
    """`error`, one line for a person, and `needed_bytes`, at least, from a message of the compiler."""
    if "memory space vmem" in message:  # which neither sharding the state nor smaller batches change
        return {"error": "a kernel needs more VMEM than a core has", "of": "VMEM"}
    for pattern in (
        r"Used ([\d.]+)(\w) of ([\d.]+)(\w)",
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)(\w)\)",
    ):
        if found := re.search(pattern, message):
            needed, limit = float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]
            line = f"needs at least {needed / 2**30:.2f} GiB of HBM on each chip, which has {limit / 2**30:.2f}"
            return {"error": line, "needed_bytes": needed, "limit_bytes": limit}
    return {"error": " ".join(message.split())[:200]}


def _rows(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """One row for each kind, axes, group size and network: count and bytes a step, estimated milliseconds a step."""
    rows: dict[tuple, dict[str, Any]] = {}
    for c in collectives:
        key = {
            name: value for name, value in dataclasses.asdict(c).items() if name in ("kind", "axes", "size", "network")
        }
        row = rows.setdefault(tuple(key.values()), key | {"count": 0.0, "bytes": 0.0, "milliseconds": 0.0})
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["milliseconds"] += c.times * c.milliseconds
    return sorted(rows.values(), key=lambda row: -row["milliseconds"])


if __name__ == "__main__":
    main()
