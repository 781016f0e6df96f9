"""Plans for the other generations, and the clocks of their chips beside the compiler's cycles."""

import os
import subprocess
import sys

import pytest

from launch.plan.schedule import environment
from launch.slices import find
from tests.support import ROOT
from tests.support.plans import PLANS
from trainer.metrics.flops import PEAK_FLOPS

pytestmark = [pytest.mark.tpu_compile, pytest.mark.slow]
OTHERS = ["v5e-16", "v5p-16", "v6e-16"]
# In CI two layers on one of them: a whole model takes four to six minutes.
PLANNED = [("two layers", OTHERS[0]), *(pytest.param("d8", name, marks=pytest.mark.exhaustive) for name in OTHERS)]
PLANS |= {f"d8 on {name}": ["--config=configs/c4.py:d8", f"--topology={name}"] for name in OTHERS}
PLANS |= {f"two layers on {name}": [*PLANS[f"d8 on {name}"], "--config.model.num_layers=2"] for name in OTHERS}

MATMUL = """
import sys
import jax, jax.numpy as jnp
from launch.slices import find
from launch.plan.hlo import Program
(chip, *_) = find(sys.argv[1]).describe(1).devices
here = jax.sharding.SingleDeviceSharding(chip)
x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=here)
text = jax.jit(jnp.matmul, out_shardings=here).lower(x, x).compile().as_text()
operations = list(Program(text).operations())
print(chip.device_kind.replace(" ", "_"))
print(sum(o.flops for o in operations), sum(o.instruction.cycles for o in operations))
"""


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4"])
def test_a_chips_peak_over_its_clock_is_what_the_compiler_lets_it_multiply_in_a_cycle(name):
    done = subprocess.run(
        [sys.executable, "-c", MATMUL, name],
        cwd=ROOT,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kind, *numbers = done.stdout.split()
    flops, cycles = map(float, numbers)
    assert flops == 2 * 4096**3
    chip = find(name).chip
    assert kind.replace("_", " ") == chip.device_kind
    # Nothing is quicker than the peak. A matmul of this size keeps the MXUs busy but for filling and draining them,
    # tile by tile: 87 to 97% by the compiler. A clock that were wrong by a quarter would leave these bounds.
    assert 0.8 < flops / cycles / (PEAK_FLOPS[chip.device_kind] / chip.clock) < 1


@pytest.mark.parametrize(("model", "name"), PLANNED)
def test_a_plan_for_another_generation_fits_and_adds_up(planned, model, name):
    made = planned(f"{model} on {name}")
    assert made.exit_code == 0, made.output + made.errors
    plan, chip = made.plan, find(name).chip
    assert plan["topology"] == name and plan["hbm_limit_bytes"] == chip.hbm_bytes
    assert plan["fits"] and plan["headroom"] >= 0.1
    assert plan["hbm_total_bytes"] == sum(plan["hbm_bytes"].values())
    assert plan["step_ms"] == pytest.approx(sum(plan["step_ms_by_part"].values()))
    collectives = plan["step_ms_by_part"]["collectives"] + plan["hidden_collectives_ms"]
    assert collectives == pytest.approx(sum(c["milliseconds"] for c in plan["collectives"]))
    # No chip multiplies faster than its peak, and attention kernels have matmuls of their own.
    assert plan["step_ms_by_part"]["matmuls"] > 1e3 * plan["matmul_flops"] / PEAK_FLOPS[chip.device_kind]
    assert plan["step_ms_by_part"]["attention kernel"] > 0
    assert 0 < plan["mfu"] < 1
