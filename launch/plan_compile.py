"""Compiles the trainer's own step for a slice that is not here, and measures the program: a process of its own.

    python -m launch.plan_compile REQUEST RESULT

libtpu reads its options once, when JAX first loads it, so every compilation has a process. REQUEST and RESULT are JSON
files; `measure` writes the one and reads the other.
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from launch import plan_schedule, plan_topologies
from launch.plan_hlo import Operation, Program, arrays
from trainer.errors import ConfigError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
MOVES = {"copy", "transpose", "reshape", "pad", "slice", "broadcast", "bitcast", "parameter", "constant", "tuple"}
MOVES |= {"dynamic-slice", "dynamic-update-slice", "get-tuple-element", "concatenate", "iota", "convert"}


def measure(config: ConfigDict, topology: str, slices: int = 1) -> dict[str, Any]:
    """What the compiler says of the train step of `config` on `slices` slices; `error` alone where it does not fit.

    Raises:
      ConfigError: the mesh or the batch does not fit the slice.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"config": json.loads(config.to_json()), "topology": topology, "slices": slices, "folder": name}
        (folder / "request").write_text(json.dumps(request))
        environment = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "LIBTPU_INIT_ARGS": plan_schedule.dump_options(folder / "dump"),
        }
        command = [sys.executable, "-m", "launch.plan_compile", f"{name}/request", f"{name}/result"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if not (folder / "result").exists():
            raise RuntimeError(f"compiling for {topology} failed:\n{done.stderr[-4000:]}")
        result = json.loads((folder / "result").read_text())
    if "mistake" in result:
        raise ConfigError(result["mistake"])
    return result


def main() -> None:
    """Compiles what REQUEST asks for."""
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = _compile(ConfigDict(request["config"]), request["topology"], request["slices"], request["folder"])
    except ConfigError as error:
        result = {"mistake": str(error)}
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        result = {"error": f"needs {used[1]} of {used[2]}" if used else str(error).splitlines()[0]}
    Path(sys.argv[2]).write_text(json.dumps(result))


def _compile(config: ConfigDict, topology_name: str, slices: int, folder: str) -> dict[str, Any]:
    import jax

    from trainer.checkpoint import abstract_state
    from trainer.config import check_batch
    from trainer.loop import compile_train_step
    from trainer.mesh import make_mesh
    from trainer.state import init_state, make_optimizer

    topology = plan_topologies.find(topology_name)
    if config.model.attention == "auto":
        config.model.attention = "pallas"  # what "auto" is on a TPU
    mesh = make_mesh(config.mesh, devices=list(topology.describe(slices).devices))
    check_batch(config, mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(jax.eval_shape(lambda: init_state(config, make_optimizer(config))), mesh)
        compiled = compile_train_step(config, 0, state, mesh)

    def per_chip(tree: Any) -> int:
        return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))

    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError("the compiler gives no account of its program; is this the libtpu that jax[tpu] pins?")
    parameters, optimizer = per_chip(state.params), per_chip(state.opt_state)
    operations = list(Program(text).operations())
    milliseconds, collectives = _times(operations, config, topology, Path(folder) / "dump")
    return {
        "mesh": dict(mesh.shape),
        "hbm_bytes": {
            "parameters": parameters,
            "optimizer": optimizer,
            "batch and padding": memory.argument_size_in_bytes - parameters - optimizer,
            "results beside the state": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "activations and temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "step_ms_by_part": milliseconds,
        "collectives": collectives,
        "matmul_flops": sum(o.flops * o.times for o in operations),
        "state_bytes": sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(state)),
        "hlo": text,
    }


def _times(
    operations: list[Operation], config: ConfigDict, topology: plan_topologies.Topology, dump: Path
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Milliseconds by part, and the collectives by kind and group."""
    chip = topology.chip
    parts: dict[str, float] = collections.defaultdict(float)
    moved: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for operation in operations:
        instruction = operation.instruction
        if kernel := re.match(r"(selective_attention_(?:forward|backward))", instruction.name):
            parts["attention kernel"] += operation.times * _kernel_ms(operation, kernel[1], topology, dump)
            continue
        parts[_part(operation)] += operation.times * instruction.cycles / chip.clock * 1e3
        for inner in operation.everything():
            kind = inner.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*?), \w+=", inner.text)
                size = sum(a.bytes for a in inner.arrays)
                row = moved[kind, groups[1] if groups else ""]
                row[0] += operation.times
                row[1] += operation.times * size
                # An all-reduce sends all of an array twice, the others once; over one link each way.
                parts["collectives"] += (
                    1e3 * operation.times * size * (2 if kind == "all-reduce" else 1) / (2 * chip.link_bandwidth)
                )
    rows = [{"kind": k, "groups": g, "count": n, "bytes": b} for (k, g), (n, b) in sorted(moved.items())]
    return dict(parts), rows


def _kernel_ms(operation: Operation, name: str, topology: plan_topologies.Topology, dump: Path) -> float:
    call = operation.instruction
    schedule = plan_schedule.read_schedule(dump, call.name, name)
    operands = arrays(call.text.split("operand_layout_constraints=")[1].split("frontend")[0])
    # The log-sums, float32 [batch, head groups, heads, queries], are a result of one kernel, an operand of the other.
    log_sum = next(a for a in (*call.arrays, *operands) if a.dtype == "f32" and len(a.shape) == 4)
    batch, groups, _, queries = log_sum.shape
    blocked = [a for a in operands if len(a.shape) == 3]  # positions last; those of keys are the longest
    keys = max(a.shape[-1] for a in blocked)
    block = plan_schedule.OUR_BLOCK["bf16" if any(a.dtype == "bf16" for a in blocked) else "f32"]
    query_blocks, key_blocks = max(1, queries // block), max(1, keys // block)
    cycles = schedule.cycles(query_blocks, key_blocks, (key_blocks - query_blocks) / 2)
    return 1e3 * cycles * batch * groups / topology.chip.cores / topology.chip.clock


def _part(operation: Operation) -> str:
    """Which part of the step an operation of XLA's belongs to."""
    if operation.flops:
        return "matmuls"
    where = operation.instruction.op_name
    if "jvp(" not in where:
        return "optimizer"
    if {i.opcode for i in operation.fused} | {operation.instruction.opcode} <= MOVES | {"fusion"}:
        return "data movement"
    return "elementwise in layers" if "while/body" in where.split("jvp(", 1)[1] else "loss and embedding"


if __name__ == "__main__":
    main()
