"""A cloud on this machine for launch/tpu_pod.sh."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.cloud import Cloud, git


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's code as a fresh git checkout, so that tests neither need nor touch this one's."""
    copy = tmp_path_factory.mktemp("repository")
    for name in ("configs", "data", "launch", "model", "trainer"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("constraints.txt", "pyproject.toml", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    git(copy, "init", "-q")
    git(copy, "add", "-A")
    git(copy, "commit", "-q", "-m", "start")
    return copy


@pytest.fixture
def cloud(tmp_path: Path, repository: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path, repository)
    yield cloud
    cloud.kill(cloud.launcher_processes())  # a test that failed may have left its watcher
    cloud.power_off()
    refused = tmp_path / "refused"
    assert not refused.exists(), f"the real gcloud would refuse: {refused.read_text()}"
