"""On eight emulated devices every mesh gives the loss and the gradients of one device."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from selective_attention.attention import selective_attention
from selective_attention.parallel import sharded_selective_attention, zigzag_positions
from tests.support.attention_oracle import make_inputs

AXES = ("data", "fsdp", "context", "tensor")
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]


def loss_and_gradients(attend, arrays, **options):
    """Of a loss that all outputs enter differently, in positive terms, so that its relative error means something."""

    def loss(arrays):
        out, forgotten = attend(**arrays, memory_tau=0.7, **options)
        other = jnp.cos(arrays["q"])  # laid out and ordered as the output, different for every entry
        return jnp.mean((out - other) ** 2) + jnp.mean(forgotten**2)

    return jax.jit(jax.value_and_grad(loss))(arrays)


def example(heads=8, kv_heads=8, separate=False, length=32):
    q, k, v = make_inputs(0, batch=8, length=length, heads=heads, kv_heads=kv_heads, width=4, dtype=np.float32)
    arrays = {"q": q, "k": k, "v": v}
    if separate:
        rng = np.random.default_rng(1)
        arrays |= {name: rng.normal(size=(8, length, 6)).astype(np.float32) for name in ("q_sel", "k_sel")}
    return arrays


def on_mesh(sizes, arrays, axis_type=AxisType.Explicit, **options):
    """The same by the sharded function, given and returned in the sequence's own order."""
    mesh = jax.make_mesh(sizes, AXES, axis_types=(axis_type,) * 4)
    order = zigzag_positions(arrays["q"].shape[1], sizes[2])
    options = {name: x[:, order] if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with jax.set_mesh(mesh):
        placed = {}
        for name, array in arrays.items():
            heads_axis = "tensor" if array.ndim == 4 and array.shape[2] % sizes[3] == 0 else None
            placed[name] = jax.device_put(array[:, order], P(("data", "fsdp"), "context", heads_axis))
        loss, gradients = loss_and_gradients(sharded_selective_attention, placed, **options)
    return loss, {name: np.asarray(gradient)[:, np.argsort(order)] for name, gradient in gradients.items()}


def assert_same(result, expected):
    (loss, gradients), (expected_loss, expected_gradients) = result, expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, gradient in gradients.items():
        difference = np.linalg.norm(np.ravel(gradient - expected_gradients[name]))
        assert difference <= 5e-5 * np.linalg.norm(np.ravel(expected_gradients[name])), name


@pytest.fixture(scope="module")
def one_device():
    return loss_and_gradients(selective_attention, example())


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_mesh_equals_one_device(sizes, one_device):
    assert_same(on_mesh(sizes, example()), one_device)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (2, 1, 2, 2)], ids=str)
def test_auto_axes_equal_one_device(sizes, one_device):
    assert_same(on_mesh(sizes, example(), AxisType.Auto), one_device)


@pytest.mark.parametrize(("sizes", "kv_heads"), [((2, 1, 1, 4), 4), ((2, 1, 1, 4), 2), ((1, 1, 2, 4), 1)], ids=str)
def test_grouped_heads_equal_one_device(sizes, kv_heads):
    arrays = example(kv_heads=kv_heads)
    assert_same(on_mesh(sizes, arrays), loss_and_gradients(selective_attention, arrays))


@pytest.mark.parametrize(
    ("sizes", "selection"),
    [
        ((2, 2, 1, 2), "own_head"),
        ((1, 2, 2, 2), "paper"),
        ((1, 1, 8, 1), "paper"),
        pytest.param((1, 2, 2, 2), "off", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_segments_evictions_and_separate_projections_equal_one_device(sizes, selection):
    arrays = example(separate=True)
    rng = np.random.default_rng(2)
    segment_ids = np.sort(rng.integers(0, 4, size=(8, 32)).astype(np.int32), axis=1)
    segment_ids[:, 29:] = -1
    evict_at = np.where(rng.random((8, 32)) < 0.3, np.arange(32) + 3, 32).astype(np.int32)
    options = {"segment_ids": segment_ids, "evict_at": evict_at, "selection": selection}
    expected = loss_and_gradients(selective_attention, arrays, **options)
    assert_same(on_mesh(sizes, arrays, **options), expected)


def test_axes_that_the_mesh_does_not_have_are_not_needed(one_device):
    arrays = example()
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        placed = {name: jax.device_put(array, P("data")) for name, array in arrays.items()}
        assert_same(loss_and_gradients(sharded_selective_attention, placed), one_device)


def test_without_a_mesh_it_is_the_local_function(one_device):
    assert_same(loss_and_gradients(sharded_selective_attention, example()), one_device)


def test_inside_a_shard_map_it_is_the_local_function(one_device):
    arrays = example()
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):

        def attend(*, memory_tau, **arrays):
            local = jax.shard_map(
                lambda arrays: sharded_selective_attention(**arrays, memory_tau=memory_tau),
                in_specs=(P("data"),),
                out_specs=P("data"),
            )
            return local(arrays)

        placed = {name: jax.device_put(array, P("data")) for name, array in arrays.items()}
        assert_same(loss_and_gradients(attend, placed), one_device)


def test_compiled_program_exchanges_and_holds_nothing_of_size_n_by_n():
    length, mesh = 2048, jax.make_mesh((1, 1, 4, 2), AXES)
    with jax.set_mesh(mesh):

        def shape(heads):
            sharding = jax.sharding.NamedSharding(mesh, P(None, "context", "tensor"))
            return jax.ShapeDtypeStruct((1, length, heads, 4), jnp.float32, sharding=sharding)

        def loss(arrays):
            return jnp.sum(sharded_selective_attention(**arrays) ** 2)

        arrays = {"q": shape(4), "k": shape(2), "v": shape(2)}
        text = jax.jit(jax.grad(loss)).lower(arrays).compile().as_text()
    results = re.findall(r"= \(?\w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    sizes = [(math.prod(map(int, dimensions.split(","))), operation) for dimensions, operation in results]
    assert max(sizes)[0] <= 128 * length  # a block of rows against all keys, for the column sums
    gathered = [size for size, operation in sizes if operation.startswith("all-gather")]
    chunks = 8
    assert gathered
    assert max(gathered) <= chunks * length  # one vector per chunk; keys and values are less here


def test_zigzag_evens_the_causal_work():
    positions = zigzag_positions(64, 4)
    assert sorted(positions) == list(range(64))
    work = (positions.reshape(4, 16) + 1).sum(axis=1)  # keys that each device's queries see
    assert work.max() == work.min()
    contiguous = (np.arange(64).reshape(4, 16) + 1).sum(axis=1)
    assert contiguous.max() / contiguous.mean() > 1.7
    np.testing.assert_array_equal(zigzag_positions(10, 1), np.arange(10))


@pytest.mark.parametrize(
    ("sizes", "arrays", "message"),
    [
        ((4, 4, 1, 1), {}, "a batch of 8 does not divide over data x fsdp = 16 devices"),
        ((1, 1, 1, 3), {}, "8 query heads do not divide over tensor=3"),
        ((1, 1, 1, 4), {"heads": 12, "kv_heads": 6}, "tensor=4 must divide the 6 key/value heads"),
        ((1, 1, 8, 1), {"length": 24}, "a sequence of 24 does not split into the 16 chunks of context=8"),
    ],
)
def test_what_the_mesh_does_not_divide_is_named(sizes, arrays, message):
    mesh = jax.sharding.AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda arrays: sharded_selective_attention(**arrays), example(**arrays))
