"""Every test sees eight emulated CPU devices, and no program is compiled twice. Both are set before JAX is imported."""

import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.datasets import prepare_for_training

# Tests spend most of their time in XLA's compiler. It is three times quicker where it does not optimise machine code
# and emits LLVM's language directly, without MLIR between, and takes a fifth less where a program stays in one piece:
# the other core has tests of its own.
FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}

given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# One folder for the processes of pytest and those that tests start, which inherit it; give another to keep it.
if owns_cache := "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compilation_cache-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# Tracing makes objects by the million; looking through them at Python's usual pace takes a fifth of the tests' time.
gc.set_threshold(100_000, 50, 50)


def pytest_unconfigure() -> None:
    if owns_cache:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if item.get_closest_marker("tpu_compile"):
                item.add_marker(pytest.mark.skip(reason="there is no libtpu: make setup EXTRAS=dev,tpu"))


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40,000 tokens in records of 64, 300 pieces."""
    return prepare_for_training(tmp_path_factory.mktemp("data"))


# Linux ends a process that maps more than 65,530 pieces of memory, and every compiled program maps some.
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 15_000:
        import jax

        jax.clear_caches()
        gc.collect()
