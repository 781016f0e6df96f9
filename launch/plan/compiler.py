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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from launch.plan import times
from launch.plan.collectives import Collective, Network
from launch.plan.hlo import Program
from launch.plan.result import CollectiveRow, Json, OversizedStep, Shortage, Step
from launch.plan.schedule import environment
from launch.slices import Topology, find
from trainer.errors import ConfigError
from trainer.settings import Settings, changed, read_settings

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(config: Settings, topology: Topology, slices: int = 1) -> Step | OversizedStep:
    """What the compiler says of the train step of `config` on `slices` slices.

    Raises:
      ConfigError: the mesh or the batch does not fit the slice.
      RuntimeError: compiling failed for another reason.
    """
    request = {"config": dataclasses.asdict(config), "topology": topology.name, "slices": slices}
    result = ask("launch.plan.compiler", request)
    return Step(**result["step"]) if "step" in result else read_oversized(result["oversized"])


def ask(module: str, request: Json) -> Json:
    """What the process of `module`, whose main is `answer`, makes of a request that names a topology.

    Raises:
      ConfigError: as the process found.
      RuntimeError: it ended without a result.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request").write_text(json.dumps(request | {"dump": f"{name}/dump"}))
        command = [sys.executable, "-m", module, f"{name}/request", f"{name}/result"]
        variables = os.environ | environment(folder / "dump")
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if not (folder / "result").exists():
            raise RuntimeError(f"compiling for {request['topology']} failed:\n{done.stderr[-4000:]}")
        result: Json = json.loads((folder / "result").read_text())
    if "mistake" in result:
        raise ConfigError(result["mistake"])
    return result


def answer(made: Callable[[Json], Any]) -> None:
    """Compiles what REQUEST asks for; `made` gives the dataclass of a step, or OversizedStep."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the compiler to return
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        step = made(request)
    except ConfigError as error:
        result: dict[str, object] = {"mistake": str(error)}
    else:
        result = {"oversized" if isinstance(step, OversizedStep) else "step": dataclasses.asdict(step)}
    Path(sys.argv[2]).write_text(json.dumps(result))


def read_oversized(values: Json) -> OversizedStep:
    """What `answer` wrote of one."""
    return OversizedStep(**values | {"shortage": Shortage(**values["shortage"])})


def _compile(request: Json) -> Step | OversizedStep:
    import jax

    from trainer.checks import check_batch
    from trainer.mesh import make_mesh
    from trainer.state import abstract_state
    from trainer.step import compile_train_step

    config, topology = read_settings(request["config"]), find(request["topology"])
    slices = request["slices"]
    if config.model.attention == "auto":
        config = changed(config, {"model.attention": "pallas"})  # what "auto" is on a TPU
    mesh = make_mesh(config.mesh, devices=list(topology.describe(slices).devices))
    check_batch(config, mesh.shape)
    state = abstract_state(config, mesh)

    def per_chip(tree: Any) -> int:
        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))

    parameters, optimizer = per_chip(state.params), per_chip(state.opt_state)
    state_bytes = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(state))
    try:
        compiled = compile_train_step(config, 0, state, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        of_state = {"parameters": parameters, "optimizer": optimizer}
        return OversizedStep(dict(mesh.shape), of_state, state_bytes, shortage(str(error)))
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    if memory is None or text is None or cost is None:
        raise RuntimeError("the compiler gives no account of its program; is this the libtpu that jax[tpu] pins?")
    program = Program(text)
    operations = list(program.operations())
    network = Network(dict(mesh.shape), mesh.devices, topology, slices)
    estimate = times.step_times(program, operations, network, Path(request["dump"]))
    hbm_bytes = {
        "parameters": parameters,
        "optimizer": optimizer,
        "batch and padding": memory.argument_size_in_bytes - parameters - optimizer,
        "results beside the state": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "activations and temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return Step(
        mesh=dict(mesh.shape),
        hbm_bytes=hbm_bytes,
        state_bytes=state_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        step_ms_by_part=estimate.milliseconds,
        hidden_collectives_ms=estimate.hidden,
        collectives=collective_rows(estimate.collectives),
        moved_shapes=sorted({shape for c in estimate.collectives for shape in c.shapes}),
        matmul_flops=sum(o.flops * o.times for o in operations),
        unscaled_matmul_flops=sum(o.flops for o in program.operations(scale=False)),
        compiler_flops=cost["flops"],
        hlo=text,
    )


def shortage(message: str) -> Shortage:
    """What a message of the compiler says of the memory that is missing."""
    if "memory space vmem" in message:  # which neither sharding the state nor smaller batches change
        return Shortage("a kernel needs more VMEM than a core has", of="VMEM")
    for pattern in (
        r"Used ([\d.]+)(\w) of ([\d.]+)(\w)",
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)(\w)\)",
    ):
        if found := re.search(pattern, message):
            needed, limit = float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]
            line = f"needs at least {needed / 2**30:.2f} GiB of HBM on each chip, which has {limit / 2**30:.2f}"
            return Shortage(line, needed_bytes=needed, limit_bytes=limit)
    return Shortage(" ".join(message.split())[:200])


def collective_rows(collectives: Iterable[Collective]) -> list[CollectiveRow]:
    """One row for each kind, axes, group size and network; estimated milliseconds."""
    rows: dict[tuple[str, str, int, str], CollectiveRow] = {}
    for c in collectives:
        none = CollectiveRow(
            kind=c.kind, axes=c.axes, size=c.size, network=c.network, count=0.0, bytes=0.0, milliseconds=0.0
        )
        row = rows.setdefault((c.kind, c.axes, c.size, c.network), none)
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["milliseconds"] += c.times * c.milliseconds
    return sorted(rows.values(), key=lambda row: -row["milliseconds"])


if __name__ == "__main__":
    answer(_compile)
