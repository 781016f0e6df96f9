"""What finding eviction times costs on a TPU, beside a plain pass of the same layer; no TPU and no clock is involved.

    python benchmarks/tpu_eviction.py [--rows 16,64] [--length 2048] [--policies selective,h2o,tova]

One layer of d = 12 (768 wide, 12 heads) of the evaluation, which is also that of prefill at once, is compiled for one
v4 chip in bfloat16, without eviction and with it: milliseconds of XLA's operations by the compiler's cycles, of kernels
by their schedules at a cycle a bundle, and of both together. Of a kernel that finds eviction times every query is
counted as one that evicts, and all of its program outside of such steps in each step of the grid: at most so many
bundles. The kernel of H2O and TOVA waits for keys besides, where it has none left that were fetched while it was
working: of the two, the longer. Columns:

- plain, evicting: the layer without and with eviction, and the latter in units of the former;
- kernel, XLA: of the latter what the kernel takes, and what XLA does around it;
- HBM: in which the kernel's keys could be fetched, if it fetches any;
- step: bundles of one query of a group of sequences, the mean over queries. Its reductions over lanes, two or with H2O
  and TOVA three, wait for their results, which no schedule shows: `until goal` is how many cycles a step may take
  before the layer takes 1.3 times a plain pass, or 2 times with H2O and TOVA;
- VMEM of the kernel's scratch and windows.

Policies of one's own have no kernel: theirs is the scan of XLA's operations, and so is that of all with `--scan`.
`--alone` compiles the kernels and nothing else.

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
from launch.plan.hlo import Operation, Program
from launch.slices import Generation, find

TOPOLOGY = "v4-8"
GOALS = {"eviction_times": 1.3, "eviction_by_weights": 2.0}  # of the kernels, in plain passes
VOCAB, HEADS, WIDTH = 8_192, 12, 64  # width of a head


def loops(folder: Path, kernel: str) -> list[tuple[int, int, int]]:
    """The stretches of the kernel's program between starts and ends of loops: how deep, first and last bundle."""
    program = next(p for p in sorted(folder.glob(f"*-{kernel}-*final_bundles.txt")) if "analysis" not in p.name)
    stretches: list[tuple[int, int, int]] = []
    for line in program.read_text().splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*: ?(>*)", line):
            address, depth = int(found[1], 16), len(found[2])
            first = stretches.pop()[1] if stretches and stretches[-1][0] == depth else address
            stretches.append((depth, first, address))
    return stretches


def step_bundles(folder: Path, kernel: str) -> int:
    """Bundles of the kernel's loop over queries that evict: of its two innermost loops the longer one."""
    return max(last - first + 1 for depth, first, last in loops(folder, kernel) if depth == 2)


def weights_cycles(folder: Path, kernel: str, rows: int, length: int, chip: Generation) -> dict[str, float]:
    """Cycles of the kernel of H2O and TOVA, of all its steps alone, and of fetching its keys; of one core."""
    import jax

    from inference_budget.weights_plan import COPIED, SPAN, find_sizes

    q = jax.ShapeDtypeStruct((rows, length, HEADS, WIDTH), "bfloat16")
    sizes = find_sizes(q, q)
    assert sizes is not None
    bundles = [(depth, last - first + 1) for depth, first, last in loops(folder, kernel)]
    of_columns = sum(n for depth, n in bundles if depth == 3)
    first, end = (f([n for n, (depth, _) in enumerate(bundles) if depth == 3]) for f in (min, max))
    of_step = sum(n for depth, n in bundles[first - 1 : end + 2] if depth == 2)
    outside = bundles[: first - 1] + bundles[end + 2 :]
    of_keys = max(n for depth, n in outside if depth == 2)
    other = sum(n for _, n in outside) - of_keys
    fetch = sizes.rows * HEADS * WIDTH * 2 * COPIED / (chip.hbm_bandwidth / chip.cores) * chip.clock
    whole = steps = fetched = before = 0.0
    for block in range(length // sizes.block_q):
        end_of_block = (block + 1) * sizes.block_q
        keys, spans = -(-end_of_block // COPIED), -(-end_of_block // SPAN)
        ahead = min(keys, sizes.buffers)
        # What was fetched beside the steps of the block before, then the rest beside this block's own logits.
        waited = max(0.0, ahead * fetch - before)
        before = sizes.block_q * (of_step + spans * of_columns)
        whole += waited + max(keys * of_keys, (keys - ahead) * fetch) + before + other
        steps, fetched = steps + before, fetched + keys * fetch
    groups = -(-rows // sizes.rows // chip.cores)
    return {"whole": whole * groups, "steps": steps * groups, "fetched": fetched * groups, "count": length * groups}


def vmem_bytes(folder: Path, kernel: str) -> int:
    text = next(folder.glob(f"*-{kernel}*-original.txt")).read_text()
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", text))


def compile_here(what: str, rows: int, length: int, folder: Path) -> dict[str, Any]:
    """Compiles `what` in this process, whose environment `measure` has set: a layer, or a kernel alone."""
    import jax

    topology = find(TOPOLOGY)
    # The mesh says what is compiled for; no axis of the model's is sharded over it.
    mesh = jax.sharding.Mesh(topology.describe(1).devices[:1], ("chip",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        name, alone, _ = what.partition("+alone")
        lowered = lower_kernel(name, rows, length) if alone else lower_layer(what, rows, length)
        text = lowered.compile().as_text()
        return times(text, rows, length, folder, topology.chip)


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
        HEADS, vocab_size=VOCAB, max_length=length, dtype="bfloat16", attention="pallas", num_layers=1
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
        eviction.has_kernel = eviction.has_weights_kernel = lambda *_: False
    return layer_pass.lower(graph, *arguments, policy=None if name == "plain" else find_policy(name))


def lower_kernel(policy: str, rows: int, length: int) -> Any:
    import jax

    from inference_budget import eviction_kernel, find_policy, weights_kernel
    from selective_attention.selection import Rule

    rule = Rule(WIDTH**-0.5)

    @jax.jit
    def of_selective(start, position, q_sel, k_sel, from_query, num_queries):
        return eviction_kernel.times(rule, start, position, (q_sel, k_sel), from_query, num_queries, length)

    @jax.jit
    def by_weights(f, position, q, k, *arriving):
        weighed = weights_kernel.Weighed(find_policy(policy), rule, position, f, f)
        return weights_kernel.times(weighed, q, k, None, arriving)

    of_columns, of_row = (rows, length), abstract((rows,), "int32")
    columns = abstract(of_columns, "float32"), abstract(of_columns, "int32")
    if policy == "selective":
        projection = abstract((*of_columns, WIDTH), "bfloat16")
        return of_selective.lower(*columns, projection, projection, of_row, of_row)
    projection = abstract((*of_columns, HEADS, WIDTH), "bfloat16")
    return by_weights.lower(*columns, projection, projection, of_row, of_row, of_row)


class Layer(Program):
    """Logits are taken to be bounded, as those of the shipped models are: of two branches the kernel's is taken."""

    def taken(self, branches: list[list[Operation]]) -> list[Operation]:
        kernels = [ops for ops in branches if any(o.instruction.name.startswith(tuple(GOALS)) for o in ops)]
        return super().taken(kernels or branches)


def times(text: str, rows: int, length: int, folder: Path, chip: Generation) -> dict[str, Any]:
    """Milliseconds by part; `cycle` is what a cycle of every step comes to."""
    parts = dict.fromkeys(("xla", "xla_evict", "kernels", "kernel"), 0.0)
    more: dict[str, Any] = {}
    calls: dict[str, list[str]] = {}  # of the same program: the compiler writes the schedule of one of them
    for operation in Layer(text).operations():
        if found := re.search(r'"body":"([^"]+)"', operation.instruction.text):
            calls.setdefault(found[1], []).append(operation.instruction.name)
            continue
        evicts = "/evict/" in operation.instruction.op_name
        parts["xla_evict" if evicts else "xla"] += operation.times * operation.instruction.cycles
    for body, names in calls.items():
        kernel = names[0].split(".")[0]
        if kernel not in GOALS:
            parts["kernels"] += schedule.kernel_cycles(folder, names, body) / chip.cores * len(names)
            continue
        if kernel == "eviction_by_weights":
            cycles = weights_cycles(folder, names[0], rows, length, chip)
            whole, steps, step = cycles["whole"], cycles["count"], cycles["steps"] / cycles["count"]
            more["hbm"] = 1e3 * cycles["fetched"] / chip.clock
        else:
            step, steps = step_bundles(folder, names[0]), length * -(-schedule.grid(body)[0] // chip.cores)
            whole = schedule.kernel_cycles(folder, names, body) / chip.cores + step * steps
        parts["kernel"] += whole
        more |= {"goal": GOALS[kernel], "step": round(step), "cycle": 1e3 * steps / chip.clock}
        more["vmem_mib"] = vmem_bytes(folder, names[0]) / 2**20
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
        row["room"] = evicting["step"] + (evicting["goal"] * whole - layer) / evicting["cycle"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="16", help="sequences, or candidates times windows; comma-separated")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--policies", default="selective", help="comma-separated")
    parser.add_argument("--scan", action="store_true", help="the scan also for policies that have the kernel")
    parser.add_argument("--alone", action="store_true", help="kernels alone, without a layer around them")
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
            for policy in arguments.policies.split(","):
                found.append({"rows": rows, "policy": policy, **measure(f"{policy}+alone", rows, arguments.length)})
            continue
        plain = measure("plain", rows, arguments.length)
        for policy in arguments.policies.split(","):
            found.append(compare(policy + "+scan" * arguments.scan, rows, arguments.length, plain))
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"v4, N={arguments.length}, milliseconds a layer")
    columns = {"rows": "d", "policy": "", "plain": ".2f", "evicting": ".2f", "ratio": ".2f", "kernel": ".2f"}
    columns |= {"hbm": ".2f", "xla_evict": ".2f", "step": "d", "room": ".0f", "vmem_mib": ".1f"}
    names = "rows", "policy", "plain", "evicting", "times", "kernel", "HBM", "XLA", "step", "until goal", "VMEM MiB"
    print(f"| {' | '.join(names)} |")
    print("|---" * len(names) + "|")
    for row in found:
        print(f"| {' | '.join(format(row[n], form) if n in row else '' for n, form in columns.items())} |")


if __name__ == "__main__":
    main()
