"""The pool of processes: a death is retried once, then it is an error that says where."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from tqdm import tqdm

from data import DataError
from data.workers import run_tasks

# The processes import it by name, as they would the stages.
MODULE = """
import os, pathlib
from dataclasses import dataclass

@dataclass(frozen=True)
class Task:
    folder: str
    name: str
    size: int = 10

    def __str__(self):
        return self.name

def _count(task):
    path = pathlib.Path(task.folder, task.name)
    with path.open("a") as stream:
        stream.write("x")
    return path.stat().st_size

def succeed(task, position):
    _count(task)

def die_once(task, position):
    if _count(task) == 1 and task.name == "b":
        os.kill(os.getpid(), 9)

def die_at_line_7(task, position):
    _count(task)
    position[0] = 7
    os.kill(os.getpid(), 9)

def fail(task, position):
    raise KeyError("what happened")
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "worker_stages.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "worker_stages", raising=False)
    return importlib.import_module("worker_stages")


def run(stages: ModuleType, function: str, folder: Path, workers: int = 2) -> dict[str, int]:
    """How often each of the tasks a, b, c was tried."""
    tasks = [stages.Task(str(folder), name) for name in "abc"]
    with tqdm(total=30, disable=True) as progress:
        ended = list(run_tasks(getattr(stages, function), tasks, progress, workers=workers))
    assert sorted(task.name for task in ended) == ["a", "b", "c"]
    return {name: (folder / name).stat().st_size for name in "abc"}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_task_runs_once(stages: ModuleType, tmp_path: Path, workers: int) -> None:
    assert run(stages, "succeed", tmp_path, workers) == {"a": 1, "b": 1, "c": 1}


def test_a_worker_that_dies_is_retried(stages: ModuleType, tmp_path: Path) -> None:
    assert run(stages, "die_once", tmp_path) == {"a": 1, "b": 2, "c": 1}


def test_a_worker_that_dies_twice_is_an_error_with_its_line(stages: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a:7: the worker died here 2 times \(exit code -9"):
        run(stages, "die_at_line_7", tmp_path, workers=1)
    assert (tmp_path / "a").stat().st_size == 2


def test_an_exception_is_an_error_that_names_the_task(stages: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a: KeyError: 'what happened'"):
        run(stages, "fail", tmp_path, workers=1)
