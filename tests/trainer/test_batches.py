"""Global batches hold the rows of the step, wherever the devices are, and reading ahead changes nothing."""

import numpy as np
import pytest

from data import TrainBatches, open_dataset
from trainer.batches import batch_sharding, global_batch, prefetch
from trainer.mesh import AXES, make_mesh


@pytest.fixture(scope="module")
def source(dataset_path):
    return TrainBatches(open_dataset(dataset_path), context_length=32, batch_size=16, seed=0)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 4, 1)])
def test_global_batch_is_the_rows_of_its_step(source, tiny_config, shape):
    tiny_config.mesh.update(dict(zip(AXES, shape, strict=True)))
    sharding = batch_sharding(make_mesh(tiny_config.mesh))
    batch, expected = global_batch(source, 3, sharding), source.rows(3, range(16))
    for name, rows in expected.items():
        np.testing.assert_array_equal(np.asarray(batch[name]), rows)
        assert {shard.data.shape for shard in batch[name].addressable_shards} == {
            (16 // (shape[0] * shape[1]), 32 // shape[2])[: rows.ndim]
        }


def test_prefetch_yields_the_batches_in_order(source, tiny_config):
    sharding = batch_sharding(make_mesh(tiny_config.mesh))
    for step, (batch, seconds) in zip(range(5, 9), prefetch(source, range(5, 9), sharding), strict=True):
        np.testing.assert_array_equal(np.asarray(batch["targets"]), source.rows(step, range(16))["targets"])
        assert seconds > 0


def test_error_while_reading_reaches_the_consumer(source, tiny_config):
    class Broken:
        batch_size, context_length = source.batch_size, source.context_length

        def rows(self, step, rows):
            if step == 2:
                raise OSError("the disk is gone")
            return source.rows(step, rows)

    iterator = prefetch(Broken(), range(5), batch_sharding(make_mesh(tiny_config.mesh)))
    next(iterator), next(iterator)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
