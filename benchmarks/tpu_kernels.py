"""What the TPU attention kernels cost, by the TPU compiler's own schedules; no TPU and no clock is involved.

    python benchmarks/tpu_kernels.py [--generations v4,v5e] [--length 512] [--heads 12] [--width 64] [--blocks 256,512]

A forward and backward pass is compiled for a named TPU with libtpu (`pip install "jax[tpu]"`), and the final VLIW
programs are read: one bundle takes at least one cycle, so the bundles of the region that runs per tile are its cost.
Programs: "selective" and "standard" are this project's kernels with and without selection; "splash" is JAX's splash
attention, which has no selection, in blocks of 512. `--blocks` tries others, each of a kernel's apart, and the sums at
the end take each kernel's best: the one of fewest milliseconds. Blocks that do not fit VMEM are left out. Columns:

- block: the side of a tile;
- bundles per 1,024 logits of one head, of a whole tile and of one on the diagonal (of all its pairs, hidden or not);
- ends: bundles of the starts and ends of blocks; other: of a grid step outside of all these, at most: its pipeline;
- the busiest slots of a whole tile, by the share of bundles; registers spilled in it;
- VMEM of scratch and windows; HBM bytes of the operands and results of a call, each once;
- ms: all tiles and steps, the forward kernel's skipped ones too, of `--batch` sequences of `--length`, on one chip, at
  one cycle a bundle.

The table comes out the same on every machine.

    python benchmarks/tpu_kernels.py --decode [--generations v4,v5e] [--batch 32] [--heads 12] [--width 64]

One token a row over a layer's cache, bfloat16: the full cache of 2,048, and budgets of 512, 128 and 43. "int8" is
"selective" with keys and values in int8, with their scales. "paged" is JAX's paged attention, which neither writes,
evicts nor selects, over the same bytes in heads of 128 (it takes no others), in pages of up to 512 slots. Columns:
bundles of a grid step and the steps of a call; milliseconds by this schedule alone and by fetching keys and values (and
scales) alone, at the published bandwidth; both together, where fetches run beside the schedule but for the first one;
and that over the fetches.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.plan import schedule
from launch.slices import find

SLICES = {"v4": "v4-8", "v5p": "v5p-8", "v5e": "v5e-4", "v6e": "v6e-4"}  # what is compiled for, of each generation
KERNELS = {  # of a program, as the compiler names them
    "selective": ("selective_attention_forward", "selective_attention_backward"),
    "splash": ("splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq"),
}
KERNELS["standard"] = KERNELS["selective"]
SPLASH_BLOCK = 512
FULL = 2048  # slots of a full cache
ITEM_BYTES = {"f32": 4, "s32": 4, "bf16": 2, "s8": 1}


def vmem_bytes(folder: Path, kernel: str) -> int:
    text = next(folder.glob(f"*{kernel}*-original.txt")).read_text()
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", text))


def hbm_bytes(hlo: str, kernel: str) -> int:
    """Operands and results of a kernel's call, each once; windows on parts of an operand are one operand."""
    call = next(line for line in hlo.splitlines() if re.match(rf"\s*(ROOT )?%{kernel}", line))
    results, rest = call.split(" custom-call(")
    source = dict(re.findall(r"%([\w.-]+) = \S+ bitcast\(%([\w.-]+)\)", hlo))
    names = [source.get(name, name) for name in re.findall(r"%([\w.-]+)", rest.split("custom_call_target")[0])]
    shape = r"\b(f32|s32|bf16|s8)\[([\d,]*)\]"
    layouts = re.findall(shape, rest.split("operand_layout_constraints=")[1].split("frontend")[0])
    arrays = re.findall(shape, results) + list(dict(zip(names, layouts, strict=True)).values())
    return sum(ITEM_BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in arrays)


def largest_array(hlo: str) -> int:
    """Elements of the largest array of the whole compiled program."""
    shapes = re.findall(r"\b(f32|s32|bf16|s8|pred)\[([\d,]+)\]", hlo)
    # A row of s8 is the bytes of another array, parts of which v6e's programs fetch ahead.
    counted = [shape for kind, shape in shapes if kind != "s8" or "," in shape]
    return max(math.prod(int(n) for n in shape.split(",")) for shape in counted)


def attention(program: str, length: int, heads: int, block: int):
    """The function of q, k, v [B, N, H, D] that is compiled."""
    if program != "splash":
        from selective_attention import Selection, selective_attention

        selection = Selection.PAPER if program == "selective" else Selection.OFF
        return lambda q, k, v: selective_attention(q, k, v, selection=selection, implementation="pallas")
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = {f"block_{name}": min(block or SPLASH_BLOCK, length) for name in names}
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)

    def splash(q, k, v):
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            mask, block_sizes=splash_attention_kernel.BlockSizes(**blocks)
        )
        return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)))

    return splash


def try_block(kernel: str, generation: str, block: int) -> None:
    """Puts `block` into the table of tilings for one kernel; the other one keeps its own."""
    from selective_attention.implementations.tpu import plan as pallas_tpu_plan

    name = kernel.removeprefix("selective_attention_")
    tiling = pallas_tpu_plan.TILINGS[generation]
    pallas_tpu_plan.TILINGS[generation] = tiling._replace(**{name: block, f"{name}_float32": block})


def compile_here(program: str, kernels: list[str], block: int, arguments: argparse.Namespace, folder: Path):
    """Compiles in this process, whose environment `measure` has set, and reads the schedules: one row per kernel."""
    import jax
    import jax.numpy as jnp

    topology = find(SLICES[arguments.generation])
    chip = topology.chip
    mesh = jax.sharding.Mesh(topology.describe(1).devices[:1], ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    shape = (arguments.batch, arguments.length, arguments.heads, arguments.width)
    if block and program != "splash":
        try_block(kernels[0], arguments.generation, block)
    function = attention(program, arguments.length, arguments.heads, block)

    def loss(q, k, v):
        return jnp.sum(function(q, k, v).astype(jnp.float32) ** 2)

    compiled = function if kernels == ["selective_attention_forward"] else jax.grad(loss, argnums=(0, 1, 2))
    with jax.set_mesh(mesh):
        q = jax.ShapeDtypeStruct(shape, arguments.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
        try:
            hlo = jax.jit(compiled).lower(q, q, q).compile().as_text()
        except jax.errors.JaxRuntimeError as error:
            if block and "vmem" in str(error):
                return []
            raise
    rows = []
    for kernel in kernels:
        found = schedule.read_schedule(folder, f"{kernel}*", kernel)
        if program == "splash":
            batch, groups, blocks = (
                arguments.batch,
                arguments.heads,
                [arguments.length // min(block or SPLASH_BLOCK, arguments.length)] * 2,
            )
        else:
            batch, groups, *blocks = schedule.grid(re.search(rf'%{kernel}.*"body":"([^"]+)"', hlo)[1])
        few, many = sorted(blocks)  # queries may come in chunks
        of_sequence = found.cycles(few, many, (many - few) / 2, every=kernel not in schedule.LISTED)
        cycles = many // few * batch * groups * of_sequence / chip.cores
        side = arguments.length // many
        logits = side**2 * arguments.heads / groups / 1024
        rows.append(
            {
                "generation": arguments.generation,
                "program": program,
                "kernel": kernel,
                "block": side,
                "bundles": found.tile.bundles / logits,
                "bundles_diagonal": found.diagonal.bundles / logits,
                "bundles_ends": found.ends,
                "bundles_other": found.other,
                "heads": arguments.heads // groups,
                "width": arguments.width,
                "tiles": [found.tile.bundles, found.diagonal.bundles, *(region.bundles for region in found.rare)],
                "busy": dict(sorted(found.tile.busy.items(), key=lambda item: -item[1])[:3]),
                "spills": found.tile.spills,
                "vmem": vmem_bytes(folder, kernel),
                "hbm": hbm_bytes(hlo, kernel),
                "largest_array": largest_array(hlo),
                "milliseconds": 1e3 * cycles / chip.clock,
            }
        )
    return rows


def decoding(program: str, slots: int, arguments: argparse.Namespace):
    """One layer's attention of a token a row: (the function that is compiled, its arguments, the steps of its grid)."""
    import jax
    import jax.numpy as jnp

    from selective_attention import Selection
    from selective_attention.implementations.tpu.decode import decode, make_plan
    from selective_attention.selection import Projections
    from selective_attention.slots import scale_shape, slots_shape

    batch, heads, width = arguments.batch, arguments.heads, arguments.width
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if program == "paged":
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

        heads, page = heads * width // 128, next(n for n in (512, 128, 48) if -(-slots // 8) * 8 % n == 0)
        pages = -(-slots // page)
        kv = jax.ShapeDtypeStruct((heads, batch * pages, page, 128), jnp.bfloat16)
        q = jax.ShapeDtypeStruct((batch, heads, 128), jnp.bfloat16)
        indices = jax.ShapeDtypeStruct((batch, pages), jnp.int32)
        options = {"pages_per_compute_block": 1, "inline_seq_dim": False}
        options["megacore_mode"] = "batch" if find(SLICES[arguments.generation]).chip.cores == 2 else None
        attend = functools.partial(paged_attention, **options)
        return attend, (q, kv, kv, integers, indices), batch * heads * pages
    token = jax.ShapeDtypeStruct((batch, 1, heads, width), jnp.bfloat16)
    dtype = jnp.int8 if program == "int8" else jnp.bfloat16
    shape = slots_shape(batch, heads, slots, width, fused=True, dtype=dtype)
    held = {name: jax.ShapeDtypeStruct((shape[0], *shape[2:]), dtype) for name in ("k", "v")}
    if program == "int8":
        _, _, *scales = scale_shape(batch, heads, slots, fused=True)
        held["scale"] = jax.ShapeDtypeStruct((batch, *scales), jnp.bfloat16)
    if slots < FULL:
        held["position"] = jax.ShapeDtypeStruct((batch, slots), jnp.int32)
    selection = Selection.OFF if program == "standard" else Selection.PAPER
    if program != "standard":
        held["f"] = jax.ShapeDtypeStruct((batch, slots), jnp.float32)
    plan = make_plan(token, held["k"], slots, heads, selection, adds=True)
    attend = functools.partial(decode, selection=selection, adds=True)
    return attend, (Projections(token, token, token), held, integers, integers), batch // plan.rows * plan.blocks


def compile_decoding(program: str, slots: int, arguments: argparse.Namespace, folder: Path) -> dict:
    """Compiles in this process, as `compile_here`: one row."""
    import jax

    topology = find(SLICES[arguments.generation])
    chip = topology.chip
    mesh = jax.sharding.Mesh(topology.describe(1).devices[:1], ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        attend, shapes, steps = decoding(program, slots, arguments)
        here = jax.NamedSharding(mesh, jax.P())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        donated = () if program == "paged" else 1
        compiled = jax.jit(attend, donate_argnums=donated).lower(*shapes).compile()
    kernel = "paged_attention" if program == "paged" else "selective_attention_decode"
    of_head = arguments.width + 2 if program == "int8" else 2 * arguments.width  # bytes of a key, with its scale
    cache = 2 * arguments.batch * -(-slots // 8) * 8 * arguments.heads * of_head
    bundles, memory = schedule.bundles(folder, kernel), compiled.memory_analysis()
    of_step = 1e3 * bundles / chip.clock, 1e3 * cache / chip.hbm_bandwidth / steps * chip.cores
    return {
        "generation": arguments.generation,
        "program": program,
        "slots": slots,
        "bundles": bundles,
        "steps": steps,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": cache,
        "schedule": 1e3 * bundles * steps / chip.cores / chip.clock,
        "hbm": 1e3 * cache / chip.hbm_bandwidth,
        "together": sum(of_step) + (steps / chip.cores - 1) * max(of_step),
    }


def show_decoding(rows: list[dict], arguments: argparse.Namespace) -> None:
    print(f"{arguments.batch} rows, {arguments.heads} heads of {arguments.width}, bfloat16")
    columns = "TPU, slots, program, bundles, steps, schedule ms, HBM ms, together ms, over HBM"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|---" * len(columns.split(", ")) + "|")
    for row in rows:
        print(
            f"| {row['generation']} | {row['slots']:,} | {row['program']} | {row['bundles']:,} | {row['steps']} "
            f"| {row['schedule']:.4f} | {row['hbm']:.4f} | {row['together']:.4f} | {row['together'] / row['hbm']:.2f} |"
        )


def measure(program: str, generation: str, kernels: tuple[str, ...], block: int, arguments: argparse.Namespace):
    """Compiles in a process of its own: libtpu reads its options once, when JAX first loads it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = schedule.environment(folder, passes=".*(final_|original).*")
        flags = [f"--{name}={getattr(arguments, name)}" for name in ("length", "heads", "width", "batch", "dtype")]
        what = f"{program}:{generation}:{','.join(kernels)}:{block}:{folder}"
        command = [sys.executable, __file__, f"--compile={what}", *flags, *["--decode"] * arguments.decode]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compiling {program} for {generation} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def variants(program: str, blocks: list[int]) -> list[tuple[tuple[str, ...], int]]:
    """What is compiled together, and in which blocks: 0 for the program's own."""
    if program == "splash" or not blocks:
        return [(KERNELS[program], block) for block in blocks or [0]]
    return [((kernel,), block) for kernel in KERNELS[program] for block in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", default="v4", help=f"of {', '.join(SLICES)}; comma-separated")
    parser.add_argument("--programs", help="comma-separated; by default all")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--blocks", default="", help="sides of tiles to try; comma-separated")
    parser.add_argument("--batch", type=int, help="sequences per chip; by default 16, with --decode 32")
    parser.add_argument("--decode", action="store_true", help="the decoding kernel instead, in bfloat16")
    parser.add_argument("--slots", default="2048,512,128,43", help="with --decode: of a layer; comma-separated")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (32 if arguments.decode else 16)
    if arguments.compile:
        program, arguments.generation, kernels, block, folder = arguments.compile.split(":")
        if arguments.decode:
            print(json.dumps(compile_decoding(program, int(block), arguments, Path(folder))))
            return
        print(json.dumps(compile_here(program, kernels.split(","), int(block), arguments, Path(folder))))
        return
    every = "standard,selective,int8,paged" if arguments.decode else "selective,standard,splash"
    generations, programs = arguments.generations.split(","), (arguments.programs or every).split(",")
    if arguments.decode:
        slots = [int(n) for n in arguments.slots.split(",")]
        cases = [(p, n) for n in slots for p in programs if n == FULL or p != "standard"]
        rows = [measure(p, generation, (), n, arguments) for generation in generations for p, n in cases]
        print(json.dumps(rows)) if arguments.json else show_decoding(rows, arguments)
        return
    tried = [int(block) for block in arguments.blocks.split(",") if block]
    rows = [
        row
        for generation in generations
        for program in programs
        for kernels, block in variants(program, tried)
        for row in measure(program, generation, kernels, block, arguments)
    ]
    if arguments.json:
        print(json.dumps(rows))
        return
    shape = f"N={arguments.length}, {arguments.heads} heads of {arguments.width}"
    print(f"{shape}, {arguments.dtype}, {arguments.batch} sequences per chip")
    columns = "TPU, program, kernel, block, bundles, diagonal, ends, other, busiest slots, spills, VMEM MiB, HBM MB, ms"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|---" * len(columns.split(", ")) + "|")
    for row in rows:
        busy = ", ".join(f"{slot} {share:.0%}" for slot, share in row["busy"].items())
        print(
            f"| {row['generation']} | {row['program']} | {row['kernel'].split('_')[-1]} | {row['block']} "
            f"| {row['bundles']:.2f} | {row['bundles_diagonal']:.2f} | {row['bundles_ends']} | {row['bundles_other']} "
            f"| {busy} | {row['spills']} | {row['vmem'] / 2**20:.1f} | {row['hbm'] / 1e6:.1f} "
            f"| {row['milliseconds']:.2f} |"
        )
    for key in dict.fromkeys((row["generation"], row["program"]) for row in rows):
        best: dict[str, dict] = {}
        for row in sorted(rows, key=lambda row: -row["milliseconds"]):
            if (row["generation"], row["program"]) == key:
                best[row["kernel"]] = row
        bundles, milliseconds = (sum(row[name] for row in best.values()) for name in ("bundles", "milliseconds"))
        sides = ", ".join(f"{name.split('_')[-1]} {row['block']}" for name, row in sorted(best.items()))
        print(f"{' '.join(key)}: {bundles:.2f} bundles, {milliseconds:.2f} ms in blocks of {sides}")


if __name__ == "__main__":
    main()
