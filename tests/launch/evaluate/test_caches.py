"""Where a run's tokenizer and text are found."""

import json

import pytest

from data import open_dataset
from launch.commands import InputError
from launch.evaluate.caches import data_of_run


@pytest.fixture
def workdir(dataset_path, tmp_path):
    """With what a checkpoint says of its run."""

    def make(path, fingerprint):
        said = {"digest": {}, "config": {"data": {"path": str(path)}}, "dataset_fingerprint": fingerprint}
        checkpoint = tmp_path / "checkpoints" / "5"
        checkpoint.mkdir(parents=True)
        (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": said}))
        return str(tmp_path)

    return make


def test_a_run_s_dataset_is_the_one_that_it_read(workdir, dataset_path):
    fingerprint = open_dataset(dataset_path).manifest.fingerprint
    assert data_of_run(workdir(dataset_path, fingerprint)).path == dataset_path


@pytest.mark.parametrize("moved", [True, False])
def test_a_dataset_that_is_not_there_any_more_is_named(moved, workdir, dataset_path, tmp_path):
    path = tmp_path / "moved" if moved else dataset_path
    with pytest.raises(InputError, match=f"{path} does not hold the dataset of .* any more; give it with --data"):
        data_of_run(workdir(path, "another"))
