"""Plans of decoding, by the real TPU compiler."""

import json
import os
import subprocess
import sys

import pytest

from launch.plan.decode import planner
from launch.plan.decode.batches import next_up
from launch.plan.decode.caches import choices
from launch.plan.decode.compiler import measure
from launch.plan.decode.parts import MEMORY
from launch.plan.decode.result import DecodeStep, Slice
from launch.plan.decode.tables import plan_table
from launch.plan.result import OversizedStep
from launch.plan.schedule import environment
from launch.slices import find
from selective_attention import TransformerConfig
from tests.launch.plan.decode.test_caches import budgets_file
from tests.support import ROOT
from tests.support.plans import Planned, run_plan

pytestmark = [pytest.mark.tpu_compile, pytest.mark.slow]
LAYERS, LENGTH, BATCH = 2, 512, 64  # a model that compiles in seconds
SIZES = {"model.width": 2, "model.num_layers": LAYERS, "model.vocab_size": 512, "context_length": LENGTH}
TINY = ["--decode", "--config=configs/c4.py:d8", "--topology=v4-8"]
TINY += [f"--config.{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Planned:
    """Full caches, by their name and by a file of budgets, and two that are a quarter, one of what is not forgotten."""
    folder = tmp_path_factory.mktemp("decode")
    files = budgets_file(folder, [LENGTH] * LAYERS, LENGTH), budgets_file(folder, [128] * LAYERS, LENGTH, "forgotten")
    flags = [f"--budgets={','.join(files)}", "--memory-factor=1,4"]
    done = run_plan(*TINY, *flags, f"--batch={BATCH}", f"--json={folder}/plan.json", f"-o={folder}/plan.png")
    assert done.returncode == 0, done.stderr
    return Planned(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture(scope="module")
def plans(made):
    return {plan["name"]: plan for plan in made.plan["plans"]}


def test_every_cache_is_planned_once_beside_the_full_ones(made, plans):
    assert list(plans) == ["standard", "full", "4x", "selective", "forgotten"]
    assert {name: plan["budgets"] for name, plan in plans.items()} == {
        "standard": [512] * 2, "full": [512] * 2, "4x": [128] * 2, "selective": [512] * 2, "forgotten": [128] * 2,
    }  # fmt: skip
    assert made.plan["chips"] == 4 and made.plan["tensor"] == 1 and made.plan["data"] == 4


def test_parts_add_up_to_the_totals(plans):
    for plan in plans.values():
        assert plan["fits"] and plan["hbm_total_bytes"] == sum(plan["hbm_bytes"].values())
        assert plan["step_ms"] == pytest.approx(sum(plan["step_ms_by_part"].values()))
        assert all(ms > 0 for part, ms in plan["step_ms_by_part"].items() if part not in ("collectives", MEMORY))
        assert {"attention over the cache", "matmuls", "logits and sampling"} <= plan["step_ms_by_part"].keys()


def test_tokens_follow_from_the_step_and_dollars_from_the_list_price(plans):
    dollars = find("v4-8").list_price[0]
    for plan in plans.values():
        assert plan["tokens_per_second"] == pytest.approx(BATCH / (plan["step_ms"] / 1e3))
        assert plan["tokens_per_second_per_chip"] == pytest.approx(plan["tokens_per_second"] / 4)
        assert plan["tokens_per_dollar"] == pytest.approx(3600 * plan["tokens_per_second"] / 4 / dollars)


def test_full_budgets_of_a_file_are_the_full_cache(plans):
    """And so is a factor of 1, which is no column of its own."""
    assert plans["selective"] == plans["full"] | {"name": "selective"}
    assert plans["full"]["memory_factor"] == 1


def test_a_smaller_cache_takes_less_memory_and_has_less_to_read(plans):
    more, less = plans["full"], plans["4x"]
    assert less["hbm_bytes"]["cache"] < more["hbm_bytes"]["cache"]
    assert less["cache_bytes"] < more["cache_bytes"] and less["needed_bytes"] < more["needed_bytes"]
    assert less["hbm_total_bytes"] < more["hbm_total_bytes"] and less["memory_factor"] > more["memory_factor"]
    assert all(plan["hbm_bytes"]["cache"] >= plan["cache_bytes"] for plan in plans.values())


def test_of_what_is_forgotten_the_hard_limit_is_planned(made, plans):
    """By the same kernel: which slots are free makes no other program, but finding them takes some cycles."""
    limit, forgotten = plans["4x"], plans["forgotten"]
    assert forgotten["policy"] == "forgotten" and "forgotten" in made.output
    for name in ("cache", "weights"):
        assert forgotten["hbm_bytes"][name] == limit["hbm_bytes"][name]
    assert forgotten["cache_bytes"] == limit["cache_bytes"] and forgotten["memory_factor"] == limit["memory_factor"]
    assert limit["step_ms"] <= forgotten["step_ms"] < 1.5 * limit["step_ms"]


def test_bytes_without_padding_are_those_of_the_formula(plans):
    heads, width, rows = 2, 64, BATCH // 4
    key_and_value = 2 * 2 * heads * width  # bfloat16
    for name, beside in (("standard", 0), ("full", 4 + 4), ("4x", 4 + 4)):  # f and the position
        slots = sum(plans[name]["budgets"])
        assert plans[name]["cache_bytes"] == rows * slots * (key_and_value + beside)
    matrices, scales = 512 * 128 + LAYERS * (4 * 128 * 128 + 3 * 128 * 384), LAYERS * (2 * 128 + 2 * 64) + 128
    assert all(plan["weight_bytes"] == 2 * matrices + 4 * scales for plan in plans.values())
    assert all(plan["needed_bytes"] == plan["weight_bytes"] + plan["cache_bytes"] for plan in plans.values())
    assert all(plan["step_ms"] > 0.999 * plan["hbm_limit_ms"] for plan in plans.values())
    assert plans["4x"]["hbm_limit_ms"] == pytest.approx(1e3 * plans["4x"]["needed_bytes"] / 1228e9)


def test_int8_takes_half_the_bytes_and_a_scale_for_each_token_and_head(plans, tmp_path):
    flags = ["--memory-factor=4", "--cache-dtype=int8", f"--batch={BATCH}", f"--json={tmp_path}/plan.json"]
    done = run_plan(*TINY, *flags)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["cache_dtype"] == "int8" and "cache in int8" in done.stdout
    heads, width, rows = 2, 64, BATCH // 4
    for plan, beside in zip(made["plans"], (0, 4 + 4, 4 + 4), strict=True):
        bytes_of_token = 2 * heads * (width + 2) + beside
        assert plan["cache_bytes"] == rows * sum(plan["budgets"]) * bytes_of_token
        assert plan["hbm_bytes"]["cache"] < 0.65 * plans[plan["name"]]["hbm_bytes"]["cache"]


COMPILE = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from inference_budget import POLICIES, Budgets, init_pruned_cache
from inference_budget.generation import Sampling, decode
from launch.slices import find
from selective_attention import TransformerConfig
from selective_attention import Transformer, TransformerConfig
from selective_attention.transformer.decoding import for_decoding
layers, length, rows, slots = map(int, sys.argv[1:])
config = TransformerConfig.from_width(2, num_layers=layers, vocab_size=512, max_length=length, attention="pallas")
chip = jax.sharding.SingleDeviceSharding(find("v4-8").describe(1).devices[0])
graph, parameters = nnx.split(for_decoding(Transformer(config, rngs=nnx.Rngs(params=0))))
cache = init_pruned_cache(config, rows, Budgets((slots,) * layers, length), POLICIES["selective"])
held = parameters, jnp.zeros((rows, 512)), cache, jax.random.key(0), jnp.float32(1)
there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), held)
loop = lambda p, logits, cache, key, t: decode(graph, p, logits, cache, key, 0, 16, Sampling(t))
m = jax.jit(loop, donate_argnums=(1, 2)).lower(*there).compile().memory_analysis()
tiles = jax.jit(lambda x: x, donate_argnums=0).lower(there[2].layers).compile().memory_analysis()
print(m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes, m.temp_size_in_bytes,
      m.generated_code_size_in_bytes, tiles.argument_size_in_bytes)
"""


def test_memory_is_the_compilers_own_account_of_the_decoders_loop(plans):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(str, (LAYERS, LENGTH, BATCH // 4, 128))],
        cwd=ROOT,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    held, temporaries, program, tiles = map(int, done.stdout.split())
    plan = plans["4x"]
    assert plan["hbm_total_bytes"] == held + temporaries + program
    assert plan["hbm_bytes"]["temporaries"] == temporaries
    assert plan["hbm_bytes"]["cache"] == tiles  # with its padding


def test_the_table_fits_a_terminal_and_says_what_it_is(made, plans):
    assert max(map(len, made.output.splitlines())) <= 80
    for words in ("Estimates, no TPU was used", "Uniform budgets", "1/4 of it on each chip", "dollars a chip-hour"):
        assert words in made.output
    assert f"{plans['4x']['tokens_per_second_per_chip']:,.0f}" in made.output


def test_the_picture_is_one(made):
    assert (made.folder / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_the_largest_batch_is_the_largest_by_the_compilers_own_words():
    config = TransformerConfig.from_width(2, num_layers=LAYERS, vocab_size=512, max_length=LENGTH)
    topology, place = find("v5e-1"), Slice("v5e-1", 1, 1)
    choice = choices(config, LENGTH, [1.0])[-1]
    made = planner.plan(choice, topology, place, None, 0.0, measure)
    larger = planner.plan(choice, topology, place, next_up(made.batch_size), 0.0, measure)
    assert made.fits and made.largest and not larger.fits
    fitting, refused = measure(choice, made.batch_size, place), measure(choice, larger.batch_size, place)
    assert isinstance(fitting, DecodeStep) and sum(fitting.hbm_bytes.values()) <= topology.chip.hbm_bytes
    assert isinstance(refused, OversizedStep) and "needs at least" in refused.shortage.error
    assert "full does NOT fit" in plan_table([made, larger], place, "both", [])


def test_tensor_parallel_chips_hold_their_heads_and_talk(tmp_path):
    flags = ["--memory-factor=4", "--mesh=tensor=2", f"--batch={BATCH}", f"--json={tmp_path}/plan.json"]
    done = run_plan(*TINY, *flags)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())["plans"][-1]
    rows, heads = BATCH // 2, 1
    assert plan["cache_bytes"] == rows * LAYERS * 128 * (2 * 2 * heads * 64 + 4 + 4)
    assert plan["step_ms_by_part"]["collectives"] > 0
    assert {(row["axes"], row["size"]) for row in plan["collectives"]} == {("tensor", 2)}
