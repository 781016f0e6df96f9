from pathlib import Path

import pytest

from tests.support.serving import Served


@pytest.fixture(scope="module")
def served(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"), dataset_path)
