"""What a run will do on a slice that you don't have, by the TPU compiler: estimates, before anything is paid for.

    python -m launch.plan --config=configs/c4.py:d12 [--topology=v4-32] [--slices=2] [--mesh=data=4,fsdp=4]
        [--json=OUT] [--hlo=OUT] [--price-per-chip-hour=DOLLARS] [--config.key=value]
    python -m launch.plan --config=configs/c4.py:d12 --topology=v4-32 --sweep [--mesh=tensor=1]
    python -m launch.plan --config=configs/c4.py:d12 --topology=v4-8,v4-16,v4-32 [--png=OUT]
    python -m launch.plan --decode [--config=configs/c4.py:d12,n2048] --memory-factor 1,4,16,47 | --budgets FILE
        [--topology=v4-8] [--batch=ROWS] [--cache-dtype=int8] [--mesh=tensor=4] [--json=OUT] [-o PNG]

Compiles the very step that the trainer runs. The first form says whether it fits and how long a step should take, and
tries what would make it fit; the second ranks meshes, `--mesh` holding axes fixed; the third shows how speed scales.
The fourth compiles the step by which `inference_budget.Decoder` serves a model instead, for each cache: full ones, of
this model and of the one without selection, and budgets, each at the largest batch that fits or at `--batch`.
How times are estimated: launch/plan/times.py. Exit codes: 0, 2 a mistake in the command, 3 does not
fit, 130 stopped by Ctrl-C.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from absl import app, flags

from launch.plan import chart, scaling, tables
from launch.plan.decode.command import Asked, plan_decoding
from launch.plan.planner import plan
from launch.plan.remedies import try_remedies
from launch.plan.result import Plan
from launch.plan.sweep import sweep
from launch.slices import Topology, find
from selective_attention.quantised import CACHE_DTYPES
from trainer.errors import EXIT_FAILED, EXIT_MISTAKE, EXIT_OUT_OF_MEMORY, ConfigError
from trainer.flags import CONFIG, parse_flags
from trainer.mesh import AXES
from trainer.settings import Settings, read_settings

TOPOLOGY = flags.DEFINE_list("topology", [], "Slices by their public names; by default the config's mesh.topology.")
SLICES = flags.DEFINE_integer("slices", 1, "How many slices, joined by their hosts' network.", lower_bound=1)
MESH = flags.DEFINE_string("mesh", "", "Sizes of axes, e.g. data=4,fsdp=2,tensor=2; by default the config's.")
SWEEP = flags.DEFINE_bool("sweep", False, "Compile all sensible meshes, and rank them.")
JSON = flags.DEFINE_string("json", "", "File for the result as JSON.")
HLO = flags.DEFINE_string("hlo", "", "File for the optimised program of a single plan.")
PNG = flags.DEFINE_string(
    "png", "", "File for a picture of how several topologies scale, or of what smaller caches bring.", short_name="o"
)
PRICE = flags.DEFINE_float("price-per-chip-hour", 0.0, "Dollars; by default the list price.", lower_bound=0.0)
DECODE = flags.DEFINE_bool("decode", False, "Plan decoding instead of training.")
BUDGETS = flags.DEFINE_list("budgets", [], "With --decode: files that `launch.budgets search` wrote.")
FACTORS = flags.DEFINE_list("memory-factor", [], "With --decode: uniform budgets, so many times smaller; 1 is full.")
BATCH = flags.DEFINE_integer("batch", None, "With --decode: rows on the slice; by default the most that fit.")
CACHE_DTYPE = flags.DEFINE_enum(
    "cache-dtype", None, CACHE_DTYPES, "With --decode: of keys and values; by default the model's."
)
EXIT_STOPPED = 130  # by Ctrl-C, as shells say it


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _mistake(
            f"unexpected argument {argv[1]!r}; flags are --topology=NAME, --config.key=value and so on, see --help"
        )
    if importlib.util.find_spec("libtpu") is None:
        _mistake("the TPU compiler is not installed; run: pip install -e '.[tpu]'")
    try:
        names = [name.strip() for name in TOPOLOGY.value]
        if CONFIG.value is not None:
            names = names or [CONFIG.value.mesh.topology]
        _check_flags(names)
        topologies = _find(names)
        fixed = parse_mesh(MESH.value)
        if DECODE.value:
            code = _run_decode(topologies[0], fixed)
        else:
            CONFIG.value.mesh.update(fixed)
            code = _run(read_settings(CONFIG.value), topologies, fixed)
    except ConfigError as error:
        _mistake(str(error))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)  # the terminal may be in the middle of a line
        code = EXIT_STOPPED
    sys.exit(code)


def _run(config: Settings, topologies: list[Topology], fixed: dict[str, int]) -> int:
    """Plans what the flags ask for, writes and prints it; the exit code."""
    topology, slices = topologies[0], SLICES.value
    if SWEEP.value:
        plans = sweep(config, topology, slices, fixed, plan)
        _write({"topology": topology.name, "slices": slices, "plans": [made.to_json() for made in plans]})
        print(f"{topology.name}, batch {config.batch_size} x {config.context_length} tokens\n")
        print(tables.sweep_table(plans))
        return 0 if plans[0].fits else EXIT_OUT_OF_MEMORY
    if len(topologies) > 1:
        rows = scaling.scale(config, topologies, slices, plan)
        _write({"scaling": rows})
        if PNG.value:
            chart.draw([dict(row) for row in rows], PNG.value)
        print(tables.scaling_table(rows))
        return 0 if any("error" not in row for row in rows) else EXIT_OUT_OF_MEMORY
    made = plan(config, topology, slices)
    if HLO.value and isinstance(made, Plan):
        Path(HLO.value).write_text(made.step.hlo)
    remedies = None
    if not made.fits:
        print("It does not fit; compiling what might", file=sys.stderr)
        remedies = try_remedies(config, made, plan)
    _write(made.to_json() | ({} if remedies is None else {"remedies": remedies}))
    dollars, date = (PRICE.value, "") if PRICE.value else topology.list_price
    print(tables.plan_table(made, dollars, remedies, date))
    return 0 if made.fits else EXIT_OUT_OF_MEMORY


def _run_decode(topology: Topology, mesh: dict[str, int]) -> int:
    """Plans decoding as the flags ask for, writes and prints it; the exit code."""
    dollars, date = (PRICE.value, "") if PRICE.value else topology.list_price
    asked = Asked(BUDGETS.value, FACTORS.value, BATCH.value, mesh, dollars, CACHE_DTYPE.value)
    config = None if CONFIG.value is None else read_settings(CONFIG.value)
    if config is not None and config.corruption is not None:
        raise ConfigError("--decode plans decoders; leave it out to plan the training of an encoder-decoder")
    made = plan_decoding(None if config is None else config.transformer, topology, asked, date)
    _write(made.to_json())
    if PNG.value:
        made.draw(PNG.value)
    print(made.table())
    return 0 if made.fits else EXIT_OUT_OF_MEMORY


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of axes in a value of `--mesh`.

    Raises:
      ConfigError: it has no such form, or no such axis.
    """
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdigit():
            raise ConfigError(f"--mesh: {item!r} is not AXIS=SIZE with an axis of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def _check_flags(names: list[str]) -> None:
    if SWEEP.value and len(names) > 1:
        raise ConfigError(f"--sweep takes one --topology, got {', '.join(names)}")
    training = {"sweep": SWEEP.value, "slices": SLICES.value != 1, "hlo": bool(HLO.value)}
    decoding = {"budgets": bool(BUDGETS.value), "memory-factor": bool(FACTORS.value), "batch": BATCH.value is not None}
    decoding["cache-dtype"] = CACHE_DTYPE.value is not None
    for flag, given in (training if DECODE.value else decoding).items():
        if given:
            other = "training; leave it out with --decode" if DECODE.value else "decoding; give --decode too"
            raise ConfigError(f"--{flag} is for {other}")
    if DECODE.value and len(names) != 1:
        raise ConfigError(f"--decode takes one --topology, got {', '.join(names) or 'none'}")
    single = not SWEEP.value and len(names) == 1
    if HLO.value and not single:
        raise ConfigError("--hlo is for a single plan; leave out --sweep, and give one --topology")
    if PNG.value and not DECODE.value and (SWEEP.value or len(names) == 1):
        raise ConfigError("--png is for several topologies, such as --topology=v4-8,v4-16,v4-32")
    for path in filter(None, (JSON.value, HLO.value, PNG.value)):
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {Path(path).parent} to write {path} to")


def _find(names: list[str]) -> list[Topology]:
    try:
        return [find(name) for name in names]
    except ValueError as error:
        raise ConfigError(f"--topology: {error}") from error


def _write(result: Mapping[str, object]) -> None:
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(result, indent=2) + "\n")


def _mistake(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    message = "Flag --config must have a value other than None."  # as absl says it of a flag that is required
    flags.register_validator("config", lambda config: config is not None or DECODE.value, message)
    app.run(main, flags_parser=parse_flags)
