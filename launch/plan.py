"""What a run will do on a slice that you don't have, by the TPU compiler: estimates, before anything is paid for.

    python -m launch.plan --config=configs/c4.py:d12 --topology=v4-32 [--slices=2] [--mesh data=4,fsdp=4]
        [--json OUT] [--hlo OUT] [--price-per-chip-hour=DOLLARS] [--config.key=value]

Compiles the very step that the trainer runs. Times are estimates: the compiler's cycles for each operation, the
attention kernels' schedules (a bundle is a cycle), collectives by their bytes over two directions of one link, nothing
overlapped; operations for which the compiler gives no cycles count as none. For several slices the plan says what fits,
and no times: traffic between slices is not priced.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from launch import plan_compile, plan_topologies
from trainer.__main__ import CONFIG, EXIT_MISTAKE, parse_flags
from trainer.config import check_config
from trainer.errors import ConfigError
from trainer.mesh import AXES
from trainer.state import model_config

TOPOLOGY = flags.DEFINE_string("topology", "v4-32", "The slice, by its public name.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of them.", lower_bound=1)
MESH = flags.DEFINE_string("mesh", "", "Sizes of axes, e.g. data=4,fsdp=2,tensor=2; by default the config's.")
JSON = flags.DEFINE_string("json", "", "File for the plan as JSON.")
HLO = flags.DEFINE_string("hlo", "", "File for the optimised program.")
PRICE = flags.DEFINE_float("price_per_chip_hour", 0.0, "Dollars.", lower_bound=0.0)
GIB = 2**30


def plan(config: ConfigDict, topology_name: str, slices: int = 1) -> dict[str, Any]:
    """The plan of one config on one topology: what `--json` writes, and `hlo`, the optimised program.

    Raises:
      ConfigError: the config, the mesh or the batch does not fit the slice.
      ValueError: there is no such topology.
    """
    topology = plan_topologies.find(topology_name)
    chips = topology.num_chips * slices
    rows = chips // max(1, config.mesh.context * config.mesh.tensor)
    if config.batch_size < rows:
        raise ConfigError(
            f"--topology={topology_name} x {slices} is too large for batch_size={config.batch_size}: its mesh has "
            f"{rows} parts along data and fsdp; choose a smaller slice or --config.batch_size={rows}"
        )
    made = plan_compile.measure(config, topology_name, slices)
    if "error" in made:
        return {"fits": False, "topology": topology_name, "slices": slices, "error": made["error"]}
    total = sum(made["hbm_bytes"].values())
    tokens = config.batch_size * config.context_length
    facts: dict[str, Any] = {
        "steps": config.steps,
        "tokens": tokens * config.steps,
        "checkpoint_bytes": made["state_bytes"],
        "dataset_bytes_for_one_epoch": tokens * config.steps * (2 if config.model.vocab_size <= 65_536 else 4),
    }
    times: dict[str, Any] = {}
    if slices == 1:
        step_ms = sum(made["step_ms_by_part"].values())
        times = {
            "step_ms": step_ms,
            "mfu": model_flops(config) / (step_ms / 1e3) / (chips * topology.chip.peak_flops),
            "tokens_per_second": tokens / (step_ms / 1e3),
        }
        seconds = config.steps * step_ms / 1e3
        facts |= {"days": seconds / 86_400, "chip_hours": seconds / 3_600 * chips}
    else:
        del made["step_ms_by_part"], made["collectives"]
    return {
        "fits": total <= topology.chip.hbm_bytes,
        "topology": topology_name,
        "slices": slices,
        "chips": chips,
        "hbm_total_bytes": total,
        "hbm_limit_bytes": topology.chip.hbm_bytes,
        "headroom": 1 - total / topology.chip.hbm_bytes,
        "run": facts,
        **times,
        **made,
    }


def model_flops(config: ConfigDict) -> float:
    """FLOPs of the model in a step: 6 x parameters in matmuls x tokens, and 12 x layers x heads' width x N x N / 2 a
    sequence for causal attention; neither the selection nor what is recomputed counts.
    """
    model, length = model_config(config), config.context_length
    counts = model.parameter_counts()
    matmuls = counts["attention"] + counts["mlp"] + model.vocab_size * model.d_model
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * length**2 / 2
    return config.batch_size * (6.0 * matmuls * length + attention)


def table(result: dict[str, Any], price: float = 0.0) -> str:
    """The plan as lines for a terminal."""
    place = f"{result['topology']} x {result['slices']}"
    if "error" in result:
        return (
            f"{place}: does NOT fit: {result['error']} of HBM. Try --config.model.remat=block, more fsdp, accumulation."
        )
    run = result["run"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    lines = [f"{place}, {result['chips']} chips, mesh {mesh}", "", "HBM per chip, by the compiler          GiB"]
    lines += [f"  {part:<32}{size / GIB:10.2f}" for part, size in result["hbm_bytes"].items()]
    verdict = "fits" if result["fits"] else "does NOT fit"
    lines += [
        f"  {'total':<32}{result['hbm_total_bytes'] / GIB:10.2f}"
        f"   {verdict}: {result['headroom']:.0%} of {result['hbm_limit_bytes'] / GIB:.2f} left",
    ]
    if "step_ms" in result:
        lines += _times(result)
    lines += [
        "",
        f"The run: {run['steps']:,} steps, {run['tokens']:,} tokens",
        f"A checkpoint: {run['checkpoint_bytes'] / GIB:.2f} GiB; a dataset of one epoch: "
        f"{run['dataset_bytes_for_one_epoch'] / 1e9:,.0f} GB",
    ]
    if "step_ms" in result:
        lines.append(f"Estimated: {run['days']:.2f} days, {run['chip_hours']:,.0f} chip-hours")
    if price and "step_ms" in result:
        lines.append(f"At {price:g} dollars a chip-hour: {price * run['chip_hours']:,.0f} dollars")
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> list[str]:
    parts = sorted(result["step_ms_by_part"].items(), key=lambda part: -part[1])
    speed = f"MFU {result['mfu']:.1%}, {result['tokens_per_second']:,.0f} tokens/s"
    collectives = sorted(result["collectives"], key=lambda row: -row["bytes"])
    return [
        "",
        "Step time, estimated                    ms",
        *(f"  {part:<32}{ms:10.2f}" for part, ms in parts),
        f"  {'total':<32}{result['step_ms']:10.2f}   {speed}",
        "",
        "Collectives in a step                count    MB (results)",
        *(
            f"  {row['kind']:<32}{row['count']:8.0f}{row['bytes'] / 1e6:12.1f}  {row['groups'][:24]}"
            for row in collectives[:8]
        ),
    ]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; values are given as --config.key=value")
    if importlib.util.find_spec("libtpu") is None:
        _mistake("the TPU compiler is not installed; run: pip install -e '.[tpu]'")
    config = CONFIG.value
    try:
        for item in filter(None, MESH.value.split(",")):
            axis, _, size = item.partition("=")
            if axis not in AXES or not size.lstrip("-").isdigit():
                raise ConfigError(f"--mesh: {item!r} is not AXIS=SIZE with an axis of {', '.join(AXES)}")
            config.mesh[axis] = int(size)
        check_config(config)
        result = plan(config, TOPOLOGY.value, SLICES.value)
    except (ConfigError, ValueError) as error:
        _mistake(str(error))
    hlo = result.pop("hlo", "")
    if HLO.value:
        Path(HLO.value).write_text(hlo)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result, PRICE.value))


def _mistake(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
