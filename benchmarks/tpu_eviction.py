"""What finding eviction times costs on a TPU, beside a plain pass of the same layer; no TPU and no clock is involved.

    python benchmarks/tpu_eviction.py [--rows 16,64] [--length 2048] [--policies selective,random]

One layer of d = 12 (768 wide, 12 heads) of the evaluation, which is also that of prefill at once, is compiled for one
v4 chip in bfloat16, without eviction and with it: milliseconds of XLA's operations by the compiler's cycles, of kernels
by their schedules at a cycle a bundle, and of both together. Of the kernel that finds eviction times every query is
counted as one that evicts, and all of its program outside of such steps in each step of the grid: at most so many
bundles. Columns:

- plain, evicting: the layer without and with eviction, and the latter in units of the former;
- kernel, XLA: of the latter what the kernel takes, and what XLA does around it;
- step: bundles of one query of up to 8 sequences. Its two reductions over lanes wait for their results, which no
  schedule shows: `until 1.3x` is how many cycles a step may take before the layer takes 1.3 times a plain pass;
- VMEM of the kernel's scratch and windows.

H2O, TOVA and policies of one's own have no kernel: theirs is the scan of XLA's operations, and so is that of all with
`--scan`. `--alone` compiles the kernel of the paper's rule and nothing else.

The table comes out the same on every machine.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.plan import schedule
from launch.plan.hlo import Program
from launch.slices import Generation, find

TOPOLOGY, KERNEL, GOAL = "v4-8", "eviction_times", 1.3
VOCAB, WIDTH = 8_192, 64  # width of a head


def step_bundles(folder: Path, kernel: str) -> int:
    """Bundles of the kernel's loop over queries that evict: of its two innermost loops the longer one."""
    program = next(p for p in sorted(folder.glob(f"*-{kernel}-*final_bundles.txt")) if "analysis" not in p.name)
    inner = [
        int(found[1], 16)
        for line in program.read_text().splitlines()
        if (found := re.match(r"\s*(0x[0-9a-f]+)\s*(?:[A-Z]{2})?\s*: >>", line))
    ]
    starts = [address for address in inner if address - 1 not in inner]
    ends = [address for address in inner if address + 1 not in inner]
    return max(end - start + 1 for start, end in zip(starts, ends, strict=True))


def vmem_bytes(folder: Path, kernel: str) -> int:
    text = next(folder.glob(f"*-{kernel}*-original.txt")).read_text()
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", text))


def compile_here(what: str, rows: int, length: int, folder: Path) -> dict[str, Any]:
    """Compiles `what` in this process, whose environment `measure` has set: a policy's layer, "plain" or "alone"."""
    import jax

    topology = find(TOPOLOGY)
    # The mesh says what is compiled for; no axis of the model's is sharded over it.
    mesh = jax.sharding.Mesh(topology.describe(1).devices[:1], ("chip",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        lowered = lower_kernel(rows, length) if what == "alone" else lower_layer(what, rows, length)
        text = lowered.compile().as_text()
    return times(text, length, folder, topology.chip)


def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    """An argument that is on the one chip."""
    import jax

    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), jax.P()))


def lower_layer(what: str, rows: int, length: int) -> Any:
    import jax
    from flax import nnx

    from inference_budget import eviction, find_policy
    from inference_budget.perplexity import layer_pass
    from selective_attention import Transformer, TransformerConfig

    config = TransformerConfig.from_width(
        12, vocab_size=VOCAB, max_length=length, dtype="bfloat16", attention="pallas", num_layers=1
    )
    graph, parameters = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))
    arguments = (
        jax.tree.map(lambda x: abstract(x.shape, x.dtype), parameters),
        abstract((rows, length, config.d_model), "bfloat16"),
        abstract((), "int32"),
        abstract((rows,), "int32"),
    )
    name, _, scan = what.partition("+")
    if scan:
        eviction.has_kernel = lambda *_: False
    return layer_pass.lower(graph, *arguments, policy=None if name == "plain" else find_policy(name))


def lower_kernel(rows: int, length: int) -> Any:
    import jax

    from inference_budget import eviction_kernel
    from selective_attention.selection import Rule

    @jax.jit
    def alone(start, position, q_sel, k_sel, from_query, num_queries):
        return eviction_kernel.times(
            Rule(WIDTH**-0.5), start, position, (q_sel, k_sel), from_query, num_queries, length
        )

    of_columns, of_rows = (rows, length), abstract((rows,), "int32")
    projection = abstract((*of_columns, WIDTH), "bfloat16")
    return alone.lower(
        abstract(of_columns, "float32"), abstract(of_columns, "int32"), projection, projection, of_rows, of_rows
    )


def times(text: str, length: int, folder: Path, chip: Generation) -> dict[str, Any]:
    """Milliseconds by part; `cycle` is what a cycle of every step comes to."""
    operations = list(Program(text).operations())
    parts = dict.fromkeys(("xla", "xla_evict", "kernels", "kernel"), 0.0)
    more: dict[str, Any] = {}
    calls: dict[str, list[str]] = {}  # of the same program: the compiler writes the schedule of one of them
    for operation in operations:
        if found := re.search(r'"body":"([^"]+)"', operation.instruction.text):
            calls.setdefault(found[1], []).append(operation.instruction.name)
            continue
        evicts = "/evict/" in operation.instruction.op_name
        parts["xla_evict" if evicts else "xla"] += operation.times * operation.instruction.cycles
    for body, names in calls.items():
        cycles = schedule.kernel_cycles(folder, names, body) / chip.cores
        if not names[0].startswith(KERNEL):
            parts["kernels"] += cycles * len(names)
            continue
        step, steps = step_bundles(folder, names[0]), length * -(-schedule.grid(body)[0] // chip.cores)
        parts["kernel"] += cycles + step * steps
        more = {"step": step, "cycle": 1e3 * steps / chip.clock, "vmem_mib": vmem_bytes(folder, names[0]) / 2**20}
    return {name: 1e3 * cycles / chip.clock for name, cycles in parts.items()} | more


def measure(what: str, rows: int, length: int) -> dict[str, Any]:
    """Compiles in a process of its own: libtpu reads its options once, when JAX first loads it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = schedule.environment(folder, passes=".*(final_|original).*")
        command = [sys.executable, __file__, f"--compile={json.dumps([what, rows, length, folder])}"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compiling {what} for {TOPOLOGY} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(policy: str, rows: int, length: int, plain: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    evicting = measure(policy, rows, length)
    whole = plain["xla"] + plain["kernels"]
    layer = evicting["xla"] + evicting["xla_evict"] + evicting["kernels"] + evicting["kernel"]
    row = {"rows": rows, "policy": policy, "plain": whole, "evicting": layer, "ratio": layer / whole, **evicting}
    if "step" in evicting:
        row["room"] = evicting["step"] + (GOAL * whole - layer) / evicting["cycle"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="16", help="sequences, or candidates times windows; comma-separated")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--policies", default="selective", help="comma-separated")
    parser.add_argument("--scan", action="store_true", help="the scan also for policies that have the kernel")
    parser.add_argument("--alone", action="store_true", help="the kernel alone, without a layer around it")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        what, rows, length, folder = json.loads(arguments.compile)
        print(json.dumps(compile_here(what, rows, length, Path(folder))))
        return
    found = []
    for rows in map(int, arguments.rows.split(",")):
        if arguments.alone:
            found.append({"rows": rows, **measure("alone", rows, arguments.length)})
            continue
        plain = measure("plain", rows, arguments.length)
        for policy in arguments.policies.split(","):
            found.append(compare(policy + "+scan" * arguments.scan, rows, arguments.length, plain))
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"v4, N={arguments.length}, milliseconds a layer")
    columns = {"rows": "d", "policy": "", "plain": ".2f", "evicting": ".2f", "ratio": ".2f", "kernel": ".2f"}
    columns |= {"xla_evict": ".2f", "step": "d", "room": ".0f", "vmem_mib": ".1f"}
    names = "rows", "policy", "plain", "evicting", "times", "kernel", "XLA", "step", f"until {GOAL}x", "VMEM MiB"
    print(f"| {' | '.join(names)} |")
    print("|---" * len(names) + "|")
    for row in found:
        print(f"| {' | '.join(format(row[n], form) if n in row else '' for n, form in columns.items())} |")


if __name__ == "__main__":
    main()
