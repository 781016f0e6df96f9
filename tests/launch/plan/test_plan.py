"""Plans of the trainer's own step, by the real TPU compiler."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from itertools import zip_longest

import pytest

from configs import c4
from configs.experiments import CONFIGS, load, step_key
from launch.plan.hlo import Program
from launch.plan.schedule import environment
from launch.slices import TOPOLOGIES
from tests.support import ROOT
from tests.support.plans import PLANS, TINY, run_plan
from trainer.hosts.requests import Request
from trainer.metrics.flops import matmul_flops, model_flops
from trainer.settings import Settings, changed, read_settings

pytestmark = pytest.mark.tpu_compile
SLOW = ["d12"]  # minutes; "tiny" is compiled in every run
STEPS = {step_key(load(name)): name.partition(":")[2] for name in reversed(CONFIGS) if "c4.py" in name}
EXHAUSTIVE = [*(name for name in STEPS.values() if name not in SLOW), "d8, two slices", "d28,vocab32k"]
SHIPPED = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
SHIPPED += [pytest.param(name, marks=pytest.mark.exhaustive) for name in EXHAUSTIVE]
shipped = pytest.mark.parametrize("name", SHIPPED)
shipped_and_tiny = pytest.mark.parametrize("name", [*SHIPPED, "tiny"])


def config_of(name: str) -> Settings:
    config = read_settings(c4.get_config(PLANS[name][0].partition(":")[2] if name in PLANS else name))
    return changed(config, TINY) if name == "tiny" else config


@shipped
def test_a_shipped_config_fits_the_slice_that_it_names_with_a_tenth_to_spare(planned, name):
    made = planned(name)
    assert made.exit_code == 0, made.output + made.errors
    assert made.plan["fits"] and made.plan["headroom"] >= 0.1
    if name not in PLANS:
        assert made.plan["topology"] == config_of(name).mesh.topology


@shipped
def test_a_chip_holds_its_share_of_each_matrix_and_every_norm(planned, name):
    plan, counts = planned(name).plan, config_of(name).transformer.parameter_counts()
    assert plan["mesh"]["fsdp"] > 1 and plan["mesh"]["tensor"] == 1
    values = (counts["total"] - counts["norms"]) / plan["mesh"]["fsdp"] + counts["norms"]
    assert plan["hbm_bytes"]["parameters"] == 4 * values  # float32
    assert plan["hbm_bytes"]["optimizer"] == 2 * 4 * values + 2 * 4  # two moments, two counts of steps


@shipped
def test_arguments_are_the_state_and_the_batch_in_whole_tiles(planned, name):
    plan = planned(name).plan
    found = list(ENTRY.finditer(planned(name).hlo.split("entry_computation_layout={(", 1)[1].split(")->", 1)[0]))
    shapes = [[int(n) for n in argument["shape"].split(",") if n] for argument in found]
    rows = plan["batch_size"] // (plan["mesh"]["data"] * plan["mesh"]["fsdp"])
    # Inputs, targets and each row's bytes of text; the step, the health's two numbers and the requests.
    beside = 4 * rows * (2 * plan["context_length"] + 1) + 4 * (3 + len(Request))
    bare = plan["hbm_bytes"]["parameters"] + plan["hbm_bytes"]["optimizer"] + beside
    assert sum(4 * math.prod(shape) for shape in shapes) == bare
    assert plan["argument_bytes"] == sum(
        4 * padded(shape, argument["order"], argument["tile"]) for shape, argument in zip(shapes, found, strict=True)
    )


# An argument of the program, all of which have four bytes a value: f32[12,192,12,64]{1,3,2,0:T(8,128)}.
ENTRY = re.compile(r"[fsu]32\[(?P<shape>[\d,]*)\]\{(?P<order>[\d,]*):T\((?P<tile>[\d,]+)\)\}")


def padded(shape: list[int], order: str, tile: str) -> int:
    """Values that an array takes up in HBM, where its fastest dimensions (`order` is from the fastest) fill tiles."""
    sizes = [shape[int(dimension)] for dimension in order.split(",") if dimension]
    sides = [int(side) for side in tile.split(",")][::-1]
    sizes += [1] * (len(sides) - len(sizes))
    return math.prod(-(-size // side) * side for size, side in zip_longest(sizes, sides, fillvalue=1))


@pytest.mark.slow
@shipped_and_tiny
def test_no_collective_moves_an_array_of_n_by_n(planned, name):
    plan, length = planned(name).plan, config_of(name).context_length
    assert plan["collectives"] and plan["moved_shapes"]
    assert not [shape for shape in plan["moved_shapes"] if shape.count(length) > 1]


@shipped_and_tiny
def test_parts_add_up_to_the_totals(planned, name):
    plan = planned(name).plan
    assert plan["step_ms"] == pytest.approx(sum(plan["step_ms_by_part"].values()))
    assert plan["hbm_total_bytes"] == sum(plan["hbm_bytes"].values())
    collectives = plan["step_ms_by_part"]["collectives"] + plan["hidden_collectives_ms"]
    assert collectives == pytest.approx(sum(c["milliseconds"] for c in plan["collectives"]))


@shipped_and_tiny
def test_matmuls_of_the_program_are_those_of_the_formula(planned, name):
    plan = planned(name).plan
    assert plan["matmul_flops"] * plan["chips"] == pytest.approx(matmul_flops(config_of(name)), rel=0.05)


@shipped
def test_flops_counted_once_a_loop_are_the_compilers(planned, name):
    plan = planned(name).plan
    assert plan["unscaled_matmul_flops"] == pytest.approx(plan["compiler_flops"], rel=0.05)


@shipped
def test_mfu_is_the_models_flops_over_what_the_chips_can_do(planned, name):
    plan = planned(name).plan
    per_second = model_flops(config_of(name)) / (plan["step_ms"] / 1e3)
    assert plan["mfu"] == pytest.approx(per_second / (275e12 * plan["chips"]))
    assert 0 < plan["mfu"] < 1


@pytest.mark.parametrize("name", ["tiny"])
def test_the_table_fits_a_terminal_and_says_that_it_estimates(planned, name):
    made = planned(name)
    assert max(map(len, made.output.splitlines())) <= 80
    assert "Estimates:" in made.output and f"{made.plan['step_ms']:.2f}" in made.output


@pytest.mark.slow
def test_only_gradients_cross_between_slices(planned):
    plan = planned("tiny").plan
    dcn = [row for row in plan["collectives"] if row["network"] == "DCN"]
    assert dcn and all(row["size"] == 2 and row["axes"] == "data" for row in dcn)
    # Each chip sends its part of the gradients, at most in float32, as parameters are.
    assert sum(row["bytes"] for row in dcn) <= plan["hbm_bytes"]["parameters"]
    assert not [row for row in planned("tiny, one slice").plan["collectives"] if row["network"] == "DCN"]


@pytest.mark.slow
def test_matmuls_stand_between_the_start_and_the_end_of_gathering_parameters_on_v4(planned):
    program = Program(planned("tiny, one slice").hlo)
    under_way: set[str] = set()
    beside: set[str] = set()
    for operation in program.operations():
        instruction = operation.instruction
        if instruction.opcode == "all-gather-start":
            under_way.add(instruction.name)
        elif instruction.opcode == "all-gather-done":
            under_way -= set(instruction.operands())
        elif operation.flops:
            beside |= under_way
    assert beside
    assert planned("tiny, one slice").plan["hidden_collectives_ms"] > 0


@pytest.mark.slow
def test_a_changed_size_changes_the_plan_by_as_much(planned):
    before, after = (planned(name).plan["hbm_bytes"] for name in ("tiny", "tiny, changed"))
    assert after["parameters"] - before["parameters"] == 512 * 128 * 4 / 2  # rows of the embedding, float32, fsdp=2
    assert after["optimizer"] - before["optimizer"] == 2 * 512 * 128 * 4 / 2


@pytest.mark.slow
def test_the_program_has_the_configs_hyperparameters(planned):
    before, after = (planned(name).hlo for name in ("tiny", "tiny, changed"))
    assert before.startswith("HloModule") and after.startswith("HloModule")
    assert "constant(0.6875)" in after and "constant(0.6875)" not in before


COMPILE = """
import json, sys
from launch.slices import find
from trainer.mesh import make_mesh
from trainer.hosts.requests import Request
from trainer.settings import read_settings
from trainer.state import abstract_state
from trainer.step import compile_train_step
settings = read_settings(json.loads(sys.argv[1]))
mesh = make_mesh(settings.mesh, list(find("v4-8").describe(2).devices))
m = compile_train_step(settings, 0, abstract_state(settings, mesh), mesh).memory_analysis()
print(m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes,
      m.generated_code_size_in_bytes)
"""


def test_memory_is_the_compilers_own_account(planned):
    config = changed(read_settings(c4.get_config("d8")), TINY | {"model.attention": "pallas"})
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(dataclasses.asdict(config))],
        cwd=ROOT,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    arguments, outputs, aliased, temporaries, program = map(int, done.stdout.split())
    plan = planned("tiny").plan
    assert plan["hbm_bytes"]["activations and temporaries"] == temporaries
    assert plan["argument_bytes"] == arguments
    assert plan["hbm_total_bytes"] == arguments + outputs - aliased + temporaries + program


DESCRIBE = """
from launch.slices import TOPOLOGIES
for topology in TOPOLOGIES.values():
    for slices in (1, 2):
        devices = topology.describe(slices).devices
        places = {(getattr(d, "slice_index", 0), *d.coords) for d in devices}
        sides = tuple(max(d.coords[side] for d in devices) + 1 for side in range(len(topology.shape)))
        print(topology.name, len(places) == topology.num_chips * slices and sides == topology.shape)
"""


def test_the_compiler_knows_every_topology_of_the_table():
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE],
        cwd=ROOT,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = [line.split() for line in done.stdout.splitlines()]
    assert len(answers) == 2 * len(TOPOLOGIES) and not [name for name, same in answers if same != "True"]


@pytest.mark.exhaustive
def test_what_does_not_fit_says_so_and_tries_what_would(tmp_path):
    flags = ["--config=configs/c4.py:d28", "--topology=v4-8", "--mesh=data=-1,fsdp=1", f"--json={tmp_path}/plan.json"]
    done = run_plan(*flags)
    assert done.returncode == 3, done.stdout + done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.json").read_text().count('"fits"') == 1 and plan["fits"] is False
    assert (
        "Does NOT fit: v4-8 is too small for this batch:\n  needs at least" in done.stdout
        and "RESOURCE_EXHAUSTED" not in done.stdout
    )
    changes = {row["change"]: row for row in plan["remedies"]}
    assert "--config.model.remat=block" in changes and "--config.accumulation=2" in changes
    assert all(("step_ms" in row) != ("needs" in row) for row in plan["remedies"])


@pytest.mark.slow
def test_a_sweep_ranks_real_meshes(tmp_path):
    flags = [*PLANS["tiny, one slice"], "--sweep", "--mesh=tensor=1", f"--json={tmp_path}/sweep.json"]
    done = run_plan(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    plans = json.loads((tmp_path / "sweep.json").read_text())["plans"]
    assert {(p["mesh"]["data"], p["mesh"]["fsdp"]) for p in plans} == {(4, 1), (2, 2), (1, 4)}
    assert [p["step_ms"] for p in plans] == sorted(p["step_ms"] for p in plans)
