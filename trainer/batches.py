"""Host rows to global arrays: each host reads only the rows of its devices, ahead of time, in threads."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NotRequired, Protocol, TypedDict, cast

import grain
import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from selective_attention import partition_spec


class Batch(TypedDict):
    """Global arrays, rows sharded over `data` and `fsdp`, positions over `context`."""

    encoder_inputs: NotRequired[Array]  # int32 [B, M], what an encoder-decoder reads; the pad id is no token
    inputs: Array  # int32 [B, N]
    targets: Array  # int32 [B, N]; the pad id is no token, and one below 0 is not to be predicted
    bytes: Array  # int32 [B], of text that a row's targets are


class Rows(Protocol):
    """What `data.TrainBatches` and `data.EvalBatches` have in common."""

    batch_size: int

    def rows(self, step: int, rows: range) -> dict[str, np.ndarray]: ...


class RemainingBatches:
    """`source` without the batches of some windows: what comes after moves up."""

    def __init__(self, source: Rows, windows: Sequence[tuple[int, int]]) -> None:
        """`windows`: ranges [start, stop) of the source's batches, disjoint."""
        self.batch_size = source.batch_size
        self._source, self._windows = source, sorted(windows)

    def index(self, step: int) -> int:
        """Which of the source's batches step number `step` (counted from 0) is made on."""
        for start, stop in self._windows:
            if step >= start:
                step += stop - start
        return step

    def rows(self, step: int, rows: range) -> dict[str, np.ndarray]:
        """As the source's."""
        return self._source.rows(self.index(step), rows)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch's [B, N] arrays: rows over `data` and `fsdp`, positions over `context`."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        spec = partition_spec(("batch", "sequence"))
    assert spec is not None  # a mesh is set
    return NamedSharding(mesh, spec)


def rows_sharding(sharding: NamedSharding) -> NamedSharding:
    """Of a batch's [B] arrays, beside [B, N] arrays of this layout."""
    return NamedSharding(sharding.mesh, jax.P(*sharding.spec[:1]))


def global_batch(source: Rows, step: int, sharding: NamedSharding) -> Batch:
    """The batch of a step as global arrays; reads the rows that this host's devices hold, once each."""
    blocks: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def local(index: tuple[slice, ...] | None, name: str) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(source.batch_size)
        if (start, stop) not in blocks:
            blocks[start, stop] = source.rows(step, range(start, stop))
        return blocks[start, stop][name][(slice(None), *index[1:])]

    arrays = {}
    for name, none in source.rows(step, range(0)).items():  # which says what there is, and how long
        shape, layout = (source.batch_size, *none.shape[1:]), sharding if none.ndim > 1 else rows_sharding(sharding)
        arrays[name] = jax.make_array_from_callback(shape, layout, functools.partial(local, name=name))
    return cast(Batch, arrays)


def prefetch(source: Rows, steps: range, sharding: NamedSharding, depth: int = 2) -> Iterator[tuple[Batch, float]]:
    """The batches of `steps`, up to `depth` of them read and on the devices ahead of the consumer, by Grain's threads,
    which begin at once.

    With each batch comes how long it took to load, seconds. An error while reading is raised where the batch would have
    been yielded.
    """

    def load(step: int) -> tuple[Batch, float]:
        start = time.monotonic()
        return global_batch(source, step, sharding), time.monotonic() - start

    batches = grain.MapDataset.range(steps.start, steps.stop).map(load)
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=depth, prefetch_buffer_size=depth)))
    iterator.start_prefetch()
    return iterator
