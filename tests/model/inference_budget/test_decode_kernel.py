"""The decoding kernel, interpreted: against plain Python, against XLA's three steps token by token, and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference_budget import Budgets, find_policy, init_pruned_cache
from selective_attention import Selection, TransformerConfig, init_cache
from selective_attention.implementations.tpu import decode as kernel
from tests.support.small_model import as_int8_holds, oracle_layer

LENGTH, KV_HEADS, WIDTH = 14, 2, 4
GROUPED = {"num_heads": 4, "num_kv_heads": KV_HEADS}


def make_config(attention="pallas", **changes):
    sizes = {"vocab_size": 8, "num_layers": 1, "num_heads": 4, "d_model": 8, "mlp_dim": 8, "head_dim": WIDTH}
    return TransformerConfig(**{**sizes, "max_length": 512, "dtype": "float32", "attention": attention, **changes})


def make_projections(config, batch=4, length=LENGTH, seed=0):
    """q, k, v, q_sel, k_sel of every token, which select strongly."""
    rng = np.random.default_rng(seed)

    def normal(*shape, by=1.0):
        return by * rng.normal(size=(batch, length, *shape)).astype(np.float32)

    q, k, v = normal(config.num_heads, WIDTH, by=2), *(normal(config.num_kv_heads, WIDTH) for _ in range(2))
    own_head = config.selection is Selection.OWN_HEAD
    return (q, k, v, normal(WIDTH, by=2), normal(WIDTH)) if own_head else (q, k, v, None, None)


def make_layer(config, budget, policy, batch=4, dtype="float32"):
    if policy is None:
        return init_cache(config, batch, budget, dtype).layers[0]
    return init_pruned_cache(config, batch, Budgets((budget,), 512), find_policy(policy), dtype).layers[0]


def poisoned(layer):
    """With NaN in the keys and values of all slots, which are free, or in their scales."""
    caches = {name: getattr(layer, name) for name in ("k", "v", "k_sel", "scale")}

    def poison(x):
        return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 127)

    return dataclasses.replace(layer, **jax.tree.map(poison, caches))


@jax.jit
def decode_all(layer, late_B, projections):
    """Tokens one by one, row b beginning `late_B[b]` steps after the first: (outputs [B, N], the layer after them)."""
    row_B = jnp.arange(len(late_B))

    def step(layer, n):
        position_B = jnp.maximum(n - late_B, 0)
        token = [None if x is None else x[row_B, position_B][:, None] for x in projections]
        out, after = layer.attend(position_B, *token)

        def of_rows_that_began(new, old):
            return jnp.where((n >= late_B).reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(of_rows_that_began, after, layer), out[:, 0]

    layer, out_NBHD = jax.lax.scan(step, layer, jnp.arange(projections[0].shape[1]))
    return out_NBHD.swapaxes(0, 1), layer


PLAIN = [
    ("pallas", policy, budget, "float32")
    for policy in ("selective", "sinks", "oldest", "forgotten-1.5")
    for budget in (2, 5)
]
PLAIN += [(attention, "selective", 5, "int8") for attention in ("pallas", "xla")]
PLAIN += [pytest.param(attention, "sinks", 2, "int8", marks=pytest.mark.slow) for attention in ("pallas", "xla")]


@pytest.mark.parametrize(("attention", "policy", "budget", "dtype"), PLAIN)
def test_it_evicts_and_attends_as_plain_python_does(attention, policy, budget, dtype):
    config = make_config(attention, **GROUPED)
    projections = make_projections(config, batch=2, seed=budget)
    layer = poisoned(make_layer(config, budget, policy, batch=2, dtype=dtype))
    assert layer.fused == (attention == "pallas")
    out, after = decode_all(layer, jnp.zeros(2, jnp.int32), projections)
    for row in range(2):
        q, k, v = (x[row] for x in projections[:3])
        if dtype == "int8":
            k, v = (as_int8_holds(x)[0] for x in (k, v))
        expected, gone = oracle_layer(find_policy(policy), budget, q, k, v, selective=True)
        np.testing.assert_allclose(out[row], expected, atol=3e-6)
        assert sorted(set(after.position[row, 0].tolist()) - {-1}) == sorted(set(range(LENGTH)) - set(gone))


CASES = {
    "random": ("random", 5, {}, "float32"),
    "own_head": ("selective", 5, {"selection": "own_head", "num_kv_heads": 1}, "float32"),
    "unprotected_self": ("selective", 3, {"selection": "unprotected_self"}, "float32"),
    "leaky": ("selective", 9, {"selection": "leaky"}, "float32"),
    "standard": ("oldest", 6, {"selection": "off"}, "float32"),
    "odd_heads": ("selective", 5, {"num_heads": 3, "num_kv_heads": 3}, "float32"),
    "bfloat16": ("selective", 5, GROUPED, "bfloat16"),
    "full": (None, 15, GROUPED, "float32"),
    "full_standard": (None, 15, {"selection": "off"}, "float32"),
    "full_own_head": (None, 15, {"selection": "own_head"}, "float32"),
    "full_bfloat16": (None, 15, {}, "bfloat16"),
    "int8": ("selective", 5, GROUPED, "int8"),
    "int8_own_head": ("selective", 5, {"selection": "own_head", "num_kv_heads": 1}, "int8"),
    "int8_standard": ("oldest", 6, {"selection": "off"}, "int8"),
    "int8_odd_heads": ("selective", 5, {"num_heads": 3, "num_kv_heads": 3}, "int8"),
    "int8_in_bfloat16": ("selective", 5, {"dtype": "bfloat16"}, "int8"),
    "full_int8": (None, 15, GROUPED, "int8"),
    "full_int8_standard": (None, 15, {"selection": "off"}, "int8"),
}


QUICK = ("own_head", "odd_heads", "bfloat16", "full", "int8_own_head", "full_int8")  # of `make test`


@pytest.mark.parametrize(
    ("policy", "budget", "changes", "dtype"),
    [pytest.param(*case, id=id, marks=[] if id in QUICK else pytest.mark.slow) for id, case in CASES.items()],
)
def test_ragged_rows_are_what_xla_computes(policy, budget, changes, dtype):
    check_against_xla(policy, budget, changes, dtype, late=(0, 9, 5, 8), length=LENGTH)


BLOCKS = [(None, 320, "float32"), pytest.param("selective", 300, "float32", marks=pytest.mark.slow)]
BLOCKS.append(pytest.param("selective", 300, "int8", marks=pytest.mark.slow))


@pytest.mark.parametrize(("policy", "budget", "dtype"), BLOCKS)
def test_many_blocks_of_slots_and_rows_are_what_xla_computes(policy, budget, dtype, monkeypatch):
    item = jnp.dtype(dtype).itemsize
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 2 * 128 * 128 * item)  # two rows of 128 slots
    monkeypatch.setattr(kernel, "LEAST_STEPS", 1)
    monkeypatch.setattr(kernel, "LEAST_STEPS_INT8", 1)
    config = make_config()
    plan = kernel.make_plan(
        jax.ShapeDtypeStruct((4, 1, 4, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((4, -(-budget // 8) * 8, 128), dtype),
        *(budget, config.num_kv_heads, config.selection),
        adds=True,
    )
    assert plan.blocks > 1 and plan.block * plan.blocks > budget  # the last one hangs over
    check_against_xla(policy, budget, {}, dtype, late=(0, 297, 167, 43), length=320)


def check_against_xla(policy, budget, changes, dtype, late, length):
    results = []
    for attention in ("xla", "pallas"):
        config = make_config(attention, **changes)
        layer = make_layer(config, budget, policy, dtype=dtype)
        layer = layer if attention == "xla" and dtype != "int8" else poisoned(layer)
        assert layer.fused == (attention == "pallas")
        results.append(decode_all(layer, jnp.asarray(late, jnp.int32), make_projections(config, length=length)))
    (expected, xla), (out, after) = results
    atol = 4e-2 if "bfloat16" in (dtype, config.dtype) else 2e-5
    for row, begins in enumerate(late):
        np.testing.assert_allclose(out[row, begins:], expected[row, begins:], atol=atol)
    if policy is not None:
        np.testing.assert_array_equal(after.position, xla.position)
    if xla.f is not None:
        np.testing.assert_allclose(after.f, xla.f, atol=atol, rtol=1e-5)


MESHES = [(GROUPED, 2, "float32"), pytest.param({"selection": "own_head"}, 4, "float32", marks=pytest.mark.slow)]
MESHES.append(pytest.param({}, 3, "float32", marks=pytest.mark.slow))  # which do not divide the heads
MESHES.append(pytest.param({}, 2, "int8", marks=pytest.mark.slow))


@pytest.mark.parametrize(("changes", "shards", "dtype"), MESHES, ids=str)
def test_a_mesh_computes_what_one_device_does(changes, shards, dtype):
    config = make_config(**changes)
    projections = make_projections(config)
    start_B = jnp.zeros(4, jnp.int32)
    expected, alone = decode_all(make_layer(config, 5, "selective", dtype=dtype), start_B, projections)
    with jax.set_mesh(jax.make_mesh((2, shards), ("data", "tensor"), devices=jax.devices()[: 2 * shards])):
        layer = make_layer(config, 5, "selective", dtype=dtype)
        assert layer.k.shape[1] == (shards if config.num_kv_heads % shards == 0 else 1)
        step = jax.jit(lambda layer, *token: layer.attend(*token))
        for n in range(LENGTH):
            token = [None if x is None else x[:, n : n + 1] for x in projections]
            out, layer = step(layer, start_B + n, *token)
            np.testing.assert_allclose(out[:, 0], expected[:, n], atol=3e-6)
    np.testing.assert_array_equal(layer.position, alone.position)
    np.testing.assert_allclose(layer.f, alone.f, atol=1e-5)


@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_policies_that_judge_by_weights_keep_the_other_path_and_layout(policy):
    layer = make_layer(make_config(), 5, policy)
    assert not layer.fused
    assert layer.k.shape == (4, 4, 5, WIDTH)
