"""Real plans, each compiled once for all tests and all of pytest's processes."""

import fcntl
import functools
import json
import os
from collections.abc import Callable

import pytest

from tests.support.plans import PLANS, Planned, run_plan


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planned]:
    """The plan of that name in PLANS, or of a variant of configs/c4.py."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @functools.cache
    def plan(name: str) -> Planned:
        folder = shared / f"plan-{name.replace(' ', '-')}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / "done.json"
            if not done.exists():
                flags = PLANS.get(name, [f"--config=configs/c4.py:{name}"])
                made = run_plan(*flags, f"--json={folder}/plan.json", f"--hlo={folder}/hlo")
                done.write_text(json.dumps([made.returncode, made.stdout, made.stderr]))
        return Planned(*json.loads(done.read_text()), folder)

    return plan
