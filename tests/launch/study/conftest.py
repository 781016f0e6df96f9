"""Runs of a study as the trainer leaves them, written by its own writer without training; numbers are drawn."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from configs import study, synthetic
from launch.study.measure import write_json
from trainer.metrics.json_lines import METRICS_FILE, JsonLinesWriter
from trainer.settings import flat, read_settings

WINDOWS, LENGTH = 6, 64
VARIANTS = {"standard": "toy,standard", "selective": "toy", "memory": "toy,memory", "heads2x": "toy,standard,heads2x"}


def write_run(folder: Path, name: str, variant: str, seed: int, *, finished: bool = True) -> dict:
    """A run, and what was measured of it; returns its numbers."""
    rng = np.random.default_rng([seed, len(name), len(variant)])
    file = synthetic if variant.startswith(synthetic.TASKS) else study
    config = file.get_config(variant)
    config.seed = seed
    workdir = folder / f"{name}-{seed}"
    (workdir / "study").mkdir(parents=True)
    writer = JsonLinesWriter(workdir / METRICS_FILE, 1)
    writer.hparams(1, flat(dataclasses.asdict(read_settings(config))))
    table = "| | |\n|---|---|\n| dataset | fingerprint 0123abcd |\n| parameters, total | 123,456 |"
    writer.text(1, "environment", table)
    curve = {3: float(rng.normal(5, 0.1)), 6: float(rng.normal(4, 0.1))}
    for step, loss in curve.items():
        writer.write(step, {"run/loss": loss, "run/validation_loss": loss})
    writer.close()
    loss = float(rng.normal(4, 0.1))
    result = {"steps": 6, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2, "tokens": 1000}
    if finished:
        (workdir / "result.json").write_text(json.dumps(result))
    measured = {
        "fingerprint": f"{name}{seed}", "data": "0123abcd", "context_length": LENGTH,
        **{key: rng.normal(4, 0.1, WINDOWS).tolist() for key in ("windows", "last_quarter", "half_context")},
        "by_position": rng.normal(4, 0.1, LENGTH).tolist(),
        "forgetting": None if "standard" in variant else {
            "distances": [2, 4, 8], "by_distance": rng.uniform(size=(1, 3)).tolist(),
            "kinds": {"number": 5}, "by_kind": {"number": [float(rng.uniform())]},
        },
    }  # fmt: skip
    write_json(workdir / "study/measured.json", measured)
    return {"result": result, "measured": measured, "curve": curve, "workdir": workdir}


def write_search(workdir: Path, policy: str, factor: float, above: float) -> None:
    """A search's file, as far as the record reads it; `above` its target on held-out windows, nats."""
    both = {"perplexity": 50.0, "last_quarter_perplexity": 49.0}
    point = {"memory_factor": factor, "perplexity": 50.0, "budgets": [int(LENGTH / factor)]}
    difference = {"nats": above, "standard_error": 0.001}
    content = {
        "memory_factor": factor, "budgets": [int(LENGTH / factor)], "context_length": LENGTH, "policy": policy,
        "search": {"target_perplexity": 50.0}, "curve": [point | {"memory_factor": 1.0}, point], "found": point,
        "checkpoint": {"path": str(workdir), "fingerprint": "0"}, "data": {"path": "none", "fingerprint": "0"},
        "baselines": {"uniform": [point], "pyramid": [point]},
        "validation": {"full": both, "pruned": both, "pruned_minus_full": difference, "target": both,
                       "pruned_minus_target": difference},
    }  # fmt: skip
    write_json(workdir / f"study/budgets-{policy}.json", content)


@pytest.fixture
def written(tmp_path: Path) -> dict[str, dict[int, dict]]:
    """Two runs of each cell, by variant and seed, in tmp_path/runs."""
    found = {
        name: {seed: write_run(tmp_path / "runs", name, variant, seed) for seed in (1, 2)}
        for name, variant in VARIANTS.items()
    }
    for name, policy, factor in (
        ("selective", "selective", 8.0), ("selective", "oldest", 3.0), ("memory", "selective", 16.0),
        ("standard", "oldest", 2.0),
    ):  # fmt: skip
        for seed, run in found[name].items():
            write_search(run["workdir"], policy, factor * seed, -0.01 * seed)
    return found
