"""Small runs of the trainer: their config, and what they leave behind."""

import json
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Of configs/demo.py.
TINY: dict[str, object] = {
    "context_length": 32,
    "batch_size": 16,
    "steps": 30,
    "model.width": 1,
    "model.vocab_size": 300,
    "optimizer.warmup_steps": 10,
    "checkpoint.every_steps": 5,
    "eval.every_steps": 10,
    "eval.pictures": False,
    "log_every_steps": 1,
}


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    with ocp.training.Checkpointer(workdir / "checkpoints") as checkpointer:
        # Another number of processes wrote it: say where its arrays shall go.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        saved = checkpointer.metadata(step).metadata
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved)
        state = checkpointer.load(step, abstract)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def losses(workdir: Path, name: str = "run/loss") -> list[tuple[int, float]]:
    """The loss series that TensorBoard shows, or another one."""
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Asserts that two finished runs ended in the same state, bit for bit, by the same losses."""
    result = json.loads((undisturbed / "result.json").read_text())
    steps = result["steps"]
    expected, state = saved_state(undisturbed, steps), saved_state(workdir, steps)
    assert expected.keys() == state.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert losses(workdir) == losses(undisturbed)
    assert losses(workdir, "run/validation_loss") == losses(undisturbed, "run/validation_loss")
    assert [step for step, _ in losses(workdir)] == list(range(1, steps + 1))  # none missing, none doubled
    assert json.loads((workdir / "result.json").read_text()) == result


def points(workdir: Path, name: str, field: str = "") -> dict[int, float]:
    """A scalar's values by step, or another field of its lines, by the rules that the file's format states."""
    found: dict[int, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        content = json.loads(line)
        first = content.get("start", content.get("rollback"))
        if first is not None:
            found = {step: value for step, value in found.items() if step < first}
        elif name in content:
            found[content["step"]] = float(content[field or name])
    return found
