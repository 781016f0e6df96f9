"""The TPU kernels leave out what is forgotten for good, and nobody misses it: interpreted on CPU, against the reference
implementation in float64.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selective_attention.implementations import reference
from selective_attention.implementations.tpu import attend as pallas_tpu
from selective_attention.implementations.tpu import plan as pallas_tpu_plan
from selective_attention.implementations.tpu.steps import Steps
from selective_attention.selection import Selection

from .test_pallas import assert_same, value_and_gradients

FORGOTTEN = 1e3  # far beyond the reach of any query here


def make(length, *, batch=2, heads=2, kv_heads=1, factor=3.0, width=64, **options):
    """Arrays and options of `attend`: logits of at most `factor`, and keys of which most, in runs of 128, are soon
    forgotten; every third run is not.
    """
    rng = np.random.default_rng(length)
    q = rng.normal(size=(batch, length, heads, width))
    k, v = (rng.normal(size=(batch, length, kv_heads, width)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q_sel = rng.uniform(size=(batch, length, 8)) / 4
    k_sel = np.where(np.arange(length) // 128 % 3 == 2, 0.01, 1.0)[:, None] * np.ones((batch, length, 8))
    told = {"offset": 0, "q_segment_ids": None, "kv_segment_ids": None, "evict_at": None, "tau": 1.0}
    told |= {"scale": 1.0, "selection": Selection.OWN_HEAD, **options}
    return [factor * q, k, v, q_sel, k_sel, np.zeros((batch, length))], told


def tiles_of(monkeypatch, forward, backward):
    tiling = pallas_tpu_plan.Tiling(forward, backward, forward, backward, 2**24)
    monkeypatch.setattr(pallas_tpu_plan, "ELSEWHERE", tiling)


def forgotten_from(monkeypatch):
    """What the backward kernel is told, once it has run."""
    ends, original = [], pallas_tpu._forgotten_from

    def told(*args):
        made = original(*args)
        jax.debug.callback(lambda x: ends.append(np.asarray(x)), made[1][0])
        return made

    monkeypatch.setattr(pallas_tpu, "_forgotten_from", told)
    return ends


def exact(arrays, options):
    with jax.enable_x64():
        return value_and_gradients(reference, arrays, options, jnp.float64)


def segments(length):
    """Packed documents: one ends within a block of queries, and the end is padding."""
    position = np.arange(length)
    ids = np.where(position < length - 9, (position >= 100).astype(np.int32), -1)
    return np.stack([ids, np.zeros_like(ids)])


def evictions(length):
    return np.arange(length) + np.random.default_rng(0).integers(2, 300, (2, length))


def test_nothing_of_forgotten_keys_is_read(monkeypatch):
    """Their values are no numbers: 128 keys of a tile beside 128 that live, and a tile of them."""
    tiles_of(monkeypatch, 256, 128)
    arrays, options = make(768, offset=512, batch=1, heads=1)
    arrays = [x[:, 512:] if n in (0, 3) else x for n, x in enumerate(arrays)]
    dead = slice(128, 512)
    arrays[5][:, dead] = FORGOTTEN
    poisoned = [*arrays]
    poisoned[2] = arrays[2].copy()
    poisoned[2][:, dead] = math.nan
    actual, expected = value_and_gradients(pallas_tpu, poisoned, options, jnp.float32), exact(arrays, options)
    assert_same(actual[:1], expected[:1], 5e-6)
    assert_same(actual, expected, 1e-5)


CASES = {
    "grouped heads": ({"length": 400, "heads": 4, "kv_heads": 2}, (128, 128)),
    "parts of tiles": ({"length": 768, "batch": 1, "heads": 1}, (256, 256)),
    "packed documents": ({"length": 400, "q_segment_ids": segments(400), "kv_segment_ids": segments(400)}, (128, 128)),
    "a late tau": ({"length": 400, "tau": 60.0}, (128, 128)),
    "any key may go": ({"length": 400, "selection": Selection.UNPROTECTED_BOS}, (128, 128)),
    "logits beyond the bound": ({"length": 400, "factor": 45.0}, (128, 128)),
    "evictions": ({"length": 400, "tau": None, "evict_at": evictions(400)}, (128, 128)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_forgotten_keys_are_missed_by_nobody(case, monkeypatch):
    given, tiles = CASES[case]
    tiles_of(monkeypatch, *tiles)
    ends = forgotten_from(monkeypatch)
    arrays, options = make(**given)
    arrays[4] *= 3
    actual, expected = value_and_gradients(pallas_tpu, arrays, options, jnp.float32), exact(arrays, options)
    assert_same(actual[:1], expected[:1], 5e-6)
    assert_same(actual, expected, 1e-5)
    jax.effects_barrier()
    num_blocks = -(-arrays[0].shape[1] // tiles[1])
    assert (np.concatenate(ends) < num_blocks).any()


@pytest.mark.parametrize(
    ("offset", "blocks"),
    [(0, (4, 4)), (256, (2, 4)), (128, (2, 6)), (100, (3, 4)), (525, (2, 6)), (340, (3, 5)), (0, (1, 1))],
    ids=str,
)
def test_the_backward_kernel_visits_living_tiles_and_no_others(offset, blocks):
    """And completes every block of queries in order, after its last tile, and of keys once."""
    (nq, nk), side = blocks, 128
    plan = types.SimpleNamespace(block_q=side, block_k=side)
    plan.first_block_q = functools.partial(pallas_tpu_plan.KernelPlan.first_block_q, plan)
    last_BJ = np.random.default_rng(offset + nq).integers(-1, nq, (3, nk))
    most, tiles, *lists = (np.asarray(x) for x in Steps.living(plan, jnp.int32(offset), jnp.asarray(last_BJ), nq))
    for b in range(3):
        steps = list(zip(*(x.reshape(3, -1)[b, :most].tolist() for x in lists), strict=True))
        first = [max(0, side * j - offset) // side for j in range(nk)]
        expected = [(j, i) for j in range(nk) for i in range(max(last_BJ[b, j], min(first[j], nq - 1)), -1, -1)]
        expected = [(j, i) for j, i in expected if i >= min(first[j], nq - 1)]
        assert [step[:2] for step in steps[: tiles[b]]] == expected
        completed = [i for _, i, complete in steps if complete == i]
        assert sorted(set(completed)) == list(range(nq)) and completed == sorted(completed)
        assert all(i >= complete for _, i, complete in steps)
        assert {j for j, i, complete in steps[: tiles[b]] if complete == i} == set(range(nk))


@pytest.mark.slow
def test_where_nothing_is_forgotten_every_bit_is_the_same(monkeypatch):
    arrays, options = make(300, selection=Selection.PAPER)
    arrays[3], arrays[4] = arrays[0][:, :, 0], arrays[1][:, :, 0]
    made = value_and_gradients(pallas_tpu, arrays, options, jnp.float32)
    monkeypatch.setattr(pallas_tpu, "reach", lambda *args, **kwargs: None)
    for one, other in zip(made, value_and_gradients(pallas_tpu, arrays, options, jnp.float32), strict=True):
        np.testing.assert_array_equal(one, other)
