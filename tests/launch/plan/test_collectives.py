"""Who takes part in a collective, over which links, and for how long."""

from types import SimpleNamespace

import numpy as np
import pytest

from launch.plan.collectives import Network, replica_groups
from launch.plan.hlo import Program
from launch.slices import find

EVENS_AND_ODDS = [[0, 2, 4, 6], [1, 3, 5, 7]]
FORMS = {
    "list": "{{0,2,4,6},{1,3,5,7}}",
    "iota": "[2,4]<=[4,2]T(1,0)",
    "mesh": "mesh['a'=4,'b'=2] {'a'}",
    "mesh of transposed ids": "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
    "part of an axis": "mesh['a'=8] {'a':(1)4}",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_forms_of_replica_groups_are_read(form):
    text = f"all-reduce(%x), channel_id=1, replica_groups={form}, use_global_device_ids=true, to_apply=%add"
    assert replica_groups(text, 8) == EVENS_AND_ODDS


def test_no_groups_are_all_devices():
    assert replica_groups("all-reduce(%x), replica_groups={}, to_apply=%add", 4) == [[0, 1, 2, 3]]


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="no known form"):
        replica_groups("all-reduce(%x), replica_groups=<all>, to_apply=%add", 4)


def network(name: str, slices: int = 1, **mesh: int) -> Network:
    """Chips in the order of their coordinates, the last side fastest."""
    topology = find(name)
    coords = np.ndindex(topology.shape)
    devices = np.array([SimpleNamespace(coords=c) for c in coords] * slices).reshape(tuple(mesh.values()))
    return Network(mesh, devices, topology, slices)


def test_axes_are_those_along_which_the_group_lies():
    net = network("v4-32", data=2, fsdp=4, tensor=2)
    assert net.along([0, 1]) == "tensor"
    assert net.along([0, 2, 4, 6]) == "fsdp"
    assert net.along(range(16)) == "data+fsdp+tensor"


def test_a_ring_has_two_links_a_side_and_a_line_one():
    assert network("v4-32", data=16).links(range(16)) == 3  # 2 x 2 x 4, open
    assert network("v4-128", data=64).links(range(64)) == 6  # 4 x 4 x 4, closed
    assert network("v4-128", data=64).links(range(4)) == 2
    assert network("v4-128", data=64).links(range(2)) == 1  # half of a ring is a line


def program(line: str) -> Program:
    return Program(
        f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  {line}\n}}\n"
    )


def only(net: Network, line: str):
    (found,) = [c for operation in program(line).operations() for c in net.collectives(operation)]
    return found


def test_an_all_reduce_sends_the_array_nearly_twice():
    net = network("v4-8", data=4)
    found = only(net, "%r = f32[1000000]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add")
    assert (found.kind, found.size, found.bytes, found.network) == ("all-reduce", 4, 4_000_000, "ICI")
    assert found.milliseconds == pytest.approx(1e3 * 2 * 3 / 4 * 4e6 / (2 * 50e9))  # two open sides


def test_an_all_gather_counts_what_is_gathered_once():
    net = network("v4-8", data=4)
    start = "%r = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}"
    assert only(net, start).bytes == 32 * 4


def test_a_reduce_scatter_counts_what_is_reduced():
    net = network("v4-8", data=4)
    line = "%r = f32[8]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add"
    assert only(net, line).bytes == 4 * 8 * 4


def test_an_all_reduce_fused_with_a_slice_of_it_is_a_reduce_scatter_whatever_the_fusion_is_called():
    scattered = """HloModule m

%all-reduce-scatter.8 (i: f32[32]) -> f32[8] {
  %i = f32[32]{0} parameter(0)
  %all-reduce.1 = f32[32]{0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[8]{0} dynamic-slice(%all-reduce.1, %n), dynamic_slice_sizes={8}
}

ENTRY %main (p: f32[32]) -> f32[8] {
  %p = f32[32]{0} parameter(0)
  %fusion.351 = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.8
  %r = f32[8]{0} all-reduce(%all-reduce-scatter.9), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    net = network("v4-8", data=4)
    found = [c for operation in Program(scattered).operations() for c in net.collectives(operation)]
    assert [c.kind for c in found] == ["reduce-scatter", "all-reduce"]
    assert found[0].bytes == 4 * 32 and found[0].milliseconds == pytest.approx(1e3 * 3 / 4 * 128 / (2 * 50e9))


def test_what_goes_to_another_slice_goes_by_the_hosts_network():
    net = network("v4-8", slices=2, data=8)
    line = "%s = (bf16[192,8,128]{2,1,0}, u32[], token[]) send(%p, %t), channel_id=4, is_host_transfer=true, "
    line += 'frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    found = only(net, line)
    assert (found.kind, found.axes, found.size, found.network) == ("all-reduce", "data", 2, "DCN")
    assert found.milliseconds == pytest.approx(1e3 * 192 * 8 * 128 * 2 / 6.25e9)
