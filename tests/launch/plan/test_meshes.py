"""Which meshes and topologies there are, and how they are compared; the planner here is a formula."""

import dataclasses
import math
import re
import time

import numpy as np
import pytest
from PIL import Image

from configs import c4
from launch.plan import chart, several
from launch.plan.compiler import shortage
from launch.plan.meshes import check_mesh, sensible_meshes
from launch.plan.planner import make_run
from launch.plan.remedies import candidates, try_remedies
from launch.plan.result import DoesNotFit, OversizedStep, Place, Plan, Shortage, Step
from launch.plan.scaling import scale
from launch.plan.several import announcement
from launch.plan.sweep import sweep
from launch.plan.tables import plan_table, scaling_table, sweep_table
from launch.slices import find
from trainer.errors import ConfigError
from trainer.settings import read_settings

V4_32 = {"data": 16, "fsdp": 1, "context": 1, "tensor": 1}


def find_all(*names):
    return [find(name) for name in names]


def ideal(config, topology, slices):
    """A plan of a machine that takes a millisecond for each sequence of a chip, and more for each part of fsdp."""
    chips = topology.num_chips * slices
    step_ms = config.batch_size / chips + config.mesh.fsdp
    step = Step(
        dataclasses.asdict(config.mesh), {"parameters": 1}, 1, 1, {"matmuls": step_ms}, 0.0, [], [], 1.0, 1.0, 1.0, ""
    )
    run = make_run(config, step_ms / 1e3, chips, step.state_bytes)
    place = Place(topology.name, slices, chips, config.batch_size, config.context_length)
    speed = 1e3 * config.batch_size / step_ms
    return Plan(place, 2 * config.batch_size // chips, 256, 0.5, step_ms, 0.5, speed, run, step)


def failed(mesh, slices, shortage):
    """A plan of d12 on slices of v4-32 that it does not fit."""
    step = OversizedStep(mesh, {"parameters": 1}, 1, shortage)
    return DoesNotFit(Place("v4-32", slices, 16 * slices, 256, 512), 2**30, step)


@pytest.mark.parametrize(
    ("name", "chips"), [("v4-8", 4), ("v4-2048", 1024), ("v5p-8", 4), ("v5e-16", 16), ("v6e-256", 256)]
)
def test_a_public_name_has_its_chips(name, chips):
    assert find(name).num_chips == chips


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'v3-8' is not a slice; choose one of v4-8, v4-16.*v6e-256"):
        find("v3-8")


def test_sensible_meshes_use_all_chips_and_divide_what_they_shard():
    meshes = sensible_meshes(read_settings(c4.get_config("d12")), find("v4-32"), 1, {})
    assert all(math.prod(mesh.values()) == 16 and 12 % mesh["tensor"] == 0 for mesh in meshes)
    assert {mesh["context"] for mesh in meshes} == {1}  # 512 tokens are too few to split
    assert len(meshes) == 5 + 4 + 3  # fsdp 1 to 16, 1 to 8, 1 to 4 at tensor 1, 2, 4
    assert {m["context"] for m in sensible_meshes(read_settings(c4.get_config("d12,n2048")), find("v4-32"), 1, {})} == {
        1,
        2,
    }


def test_a_sweep_keeps_fixed_axes_and_slices():
    meshes = sensible_meshes(read_settings(c4.get_config("d12")), find("v4-32"), 2, {"tensor": 1})
    assert [(mesh["data"], mesh["fsdp"]) for mesh in meshes] == [(32, 1), (16, 2), (8, 4), (4, 8), (2, 16)]


def test_a_sweep_without_a_mesh_says_so():
    with pytest.raises(ConfigError, match="no mesh of 1024 chips divides batch_size=256"):
        sensible_meshes(read_settings(c4.get_config("d12")), find("v4-2048"), 1, {"tensor": 1})


NOT_OF_THE_SLICE = {  # config, topology, slices, mesh; the mesh that the message names
    "of a larger slice": ("d28", "v4-8", 1, {"data": 1}, "--mesh=fsdp=4"),
    "of other chips": ("d8", "v4-8", 1, {"data": 3, "fsdp": 2}, "--mesh=data=2"),
    "of two slices": ("d12", "v4-8", 2, {"data": 2, "fsdp": 16}, "--mesh=fsdp=4"),
    "with a split sequence": ("d12", "v4-8", 1, {"data": 1, "fsdp": 2, "context": 4}, "--mesh=data=2,context=1"),
}


@pytest.mark.parametrize(
    ("name", "topology", "slices", "mesh", "example"), NOT_OF_THE_SLICE.values(), ids=NOT_OF_THE_SLICE
)
def test_a_mesh_that_the_slice_cannot_have_names_one_that_it_can(name, topology, slices, mesh, example):
    config = c4.get_config(name)
    config.mesh.update(mesh)
    with pytest.raises(ConfigError, match=f"so that the product is .*, for example {example}$"):
        check_mesh(read_settings(config), find(topology), slices)
    config.mesh.update({axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", example)})
    check_mesh(read_settings(config), find(topology), slices)


def test_a_sweep_ranks_by_time():
    plans = sweep(read_settings(c4.get_config("d12")), find("v4-32"), 1, {"tensor": 1}, ideal)
    assert [plan.mesh["fsdp"] for plan in plans] == [1, 2, 4, 8, 16]
    table = sweep_table(plans)
    assert max(map(len, table.splitlines())) <= 80 and table.count("50%") >= 5


def test_what_takes_long_says_so_beforehand(capsys):
    assert "9 meshes, 2 at once: roughly 8 minutes" in announcement(9, "meshes", 2)  # five rounds of 1.5
    assert max(map(len, announcement(999, "remedies", 8).splitlines())) <= 80
    sweep(read_settings(c4.get_config("d12")), find("v4-32"), 1, {"tensor": 1}, ideal)
    scale(read_settings(c4.get_config("d12")), find_all("v4-8", "v4-32"), 1, ideal)
    said = capsys.readouterr().err
    assert "Compiling 5 meshes" in said and "Compiling 3 programs" in said


def test_what_is_stopped_starts_nothing_more(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def job(n: int) -> None:
        started.append(n)
        time.sleep(0.1)

    started: list[int] = []
    monkeypatch.setattr(several, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        several.compile_all(job, range(100), "jobs")
    assert len(started) < 100


def test_scaling_is_relative_to_the_first_topology_that_fits():
    config = c4.get_config("d12")
    config.batch_size = 1024
    rows = scale(read_settings(config), find_all("v4-8", "v4-32", "v4-64", "v4-2048"), 1, ideal)
    weak, strong = ([row for row in rows if row["scaling"] == kind] for kind in ("weak", "strong"))
    assert [row["batch_size"] for row in weak] == [1024, 4096, 8192, 262_144] and all("error" in row for row in weak)
    assert "error" in strong[0] and strong[1]["efficiency"] == 1
    assert strong[2]["efficiency"] == pytest.approx((64 + 16) / (32 + 16) / 2)
    rows.append(
        strong[0] | {"topology": "v4-2048", "error": "--topology=v4-2048: batch_size=256 is too small" + " x" * 50}
    )
    assert max(map(len, scaling_table(rows).splitlines())) <= 80


def test_the_picture_has_both_kinds_of_scaling(tmp_path):
    rows = scale(read_settings(c4.get_config("d12")), find_all("v4-8", "v4-16", "v4-128"), 1, ideal)
    chart.draw(rows, str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}
    assert {tuple(bytes.fromhex(c[1:])) for c in chart.COLOURS.values()} <= colours


def test_the_picture_names_slices_and_shows_ideal_scaling_under_a_series_that_follows_it(tmp_path):
    rows = scale(read_settings(c4.get_config("d12")), find_all("v4-8", "v4-16", "v4-128", "v5p-16"), 1, ideal)
    assert chart.slice_names(rows) == {4: "v4-8", 8: "v4-16, v5p-16", 64: "v4-128"}
    weak = [row for row in rows if row["scaling"] == "weak"]
    assert {row["efficiency"] for row in weak} == {1.0}
    chart.draw(weak, str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as image:
        panel = np.asarray(image.convert("RGB").crop((120, 70, 540, 450)), float)  # tokens/s, without labels and ends
    for colour in (chart.IDEAL, chart.COLOURS["weak"]):
        near = np.abs(panel - list(bytes.fromhex(colour[1:]))).max(axis=-1) < 20
        assert near.any(axis=0).mean() > 0.4  # of the width: dashes leave gaps


MESSAGES = [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (78.03G) exceeds "
     "available HBM (30.75G).", 78.03),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.50G of "
     "30.75G hbm. Exceeded hbm capacity by 768.00M.", 31.5),
]  # fmt: skip


@pytest.mark.parametrize(("message", "gib"), MESSAGES)
def test_every_message_about_memory_becomes_one_line(message, gib):
    found = shortage(message)
    assert found.needed_bytes == pytest.approx(gib * 2**30)
    assert found.error == f"needs at least {gib:.2f} GiB of HBM on each chip, which has 30.75"


def test_remedies_shard_within_a_slice_and_split_what_can_be_split():
    config = c4.get_config("d12")
    single, combined = candidates(read_settings(config), failed(V4_32, 2, Shortage("needs more")))
    assert single == [{"model.remat": "block"}, {"mesh.data": 2, "mesh.fsdp": 8}, {"accumulation": 2}]
    assert combined[-1] == {"model.remat": "block", "mesh.data": 2, "mesh.fsdp": 8, "accumulation": 16}


def test_only_fewer_heads_help_where_vmem_is_too_small():
    found = shortage(
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem. "
        "Used 16.14M of 16.00M vmem."
    )
    assert found.error == "a kernel needs more VMEM than a core has"
    single, combined = candidates(read_settings(c4.get_config("d12")), failed(V4_32, 1, found))
    assert (single, combined) == ([{"mesh.data": 8, "mesh.tensor": 2}], [])


def test_remedies_go_together_only_where_none_alone_is_enough():
    too_large = failed(V4_32, 1, Shortage("needs more"))
    rows = try_remedies(read_settings(c4.get_config("d12")), too_large, ideal)
    assert rows[0]["change"] == "--config.model.remat=block" and len(rows) == 3
    rows = try_remedies(read_settings(c4.get_config("d12")), too_large, lambda *_: too_large)
    assert len(rows) == 5 and all(row["needs"] == "needs more" for row in rows)
    table = plan_table(too_large, remedies=rows)
    assert "choose a larger slice" in table and max(map(len, table.splitlines())) <= 80


def test_a_price_that_is_the_lists_says_so_and_of_when():
    plan = ideal(read_settings(c4.get_config("d12")), find("v4-32"), 1)
    dollars, date = find("v4-32").list_price
    line = next(line for line in plan_table(plan, dollars, listed=date).splitlines() if "dollars" in line)
    assert line.startswith("  at 3.22 dollars a chip-hour (list of 2025-01, on demand): ") and len(line) <= 80
    assert "(" not in next(line for line in plan_table(plan, 1.5).splitlines() if "dollars a chip-hour" in line)
