"""Checkpoints: Orbax v1, asynchronous, restored onto any mesh and any number of hosts."""

import dataclasses
import json
import os
from typing import Any

import jax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from selective_attention import Transformer
from trainer.errors import ResumeError
from trainer.state import TrainState, init_state, make_optimizer, model_config, model_graph

# Fields that a resumed run may change: none of them touches the mathematics or the order of the data.
FREE_FIELDS = ("data.path", "mesh", "checkpoint", "eval", "log_every_steps")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    state: TrainState
    last_eval_step: int  # of the last evaluation on the way; -1 if none


class Checkpoints:
    """The checkpoints of one workdir, in its folder `checkpoints`, one a step."""

    def __init__(self, workdir: str, config: ConfigDict, dataset_fingerprint: str) -> None:
        c = config.checkpoint
        keep: list[ocp.training.preservation_policies.PreservationPolicy] = [
            ocp.training.preservation_policies.LatestN(c.keep_last)
        ]
        if c.keep_every_steps:
            keep.append(ocp.training.preservation_policies.EveryNSteps(c.keep_every_steps))
        self._identity = {"config": json.loads(config.to_json()), "dataset_fingerprint": dataset_fingerprint}
        self._response: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            _folder(workdir),
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract_state: TrainState) -> Restored | None:
        """The newest checkpoint, laid out as `abstract_state` (ShapeDtypeStructs with shardings); None if there is
        none.

        Raises:
          ResumeError: it was made with another dataset, or a config that computes something else.
        """
        step = self.latest_step()
        if step is None:
            return None
        metadata = _custom_metadata(self._checkpointer, step)
        self._check_identity(step, metadata)
        return Restored(self._checkpointer.load(step, abstract_state), int(metadata["last_eval_step"]))

    def save(self, step: int, state: TrainState, last_eval_step: int) -> None:
        """Starts saving in the background; first waits for the save before, and raises what went wrong with it."""
        self.wait()
        custom = self._identity | {"last_eval_step": last_eval_step}
        self._response = self._checkpointer.save_async(step, state, custom_metadata=custom)

    def wait(self) -> None:
        """Returns when the last save is complete; raises its error."""
        response, self._response = self._response, None
        if response is not None:
            response.result()

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        self.wait()
        self._checkpointer.close()

    def _check_identity(self, step: int, saved: dict[str, Any]) -> None:
        if saved["dataset_fingerprint"] != self._identity["dataset_fingerprint"]:
            raise ResumeError(
                f"checkpoint {step} was trained on dataset {saved['dataset_fingerprint']}, but --config.data.path "
                f"holds {self._identity['dataset_fingerprint']}; give the same dataset, or another --workdir"
            )
        before, now = _flat(saved["config"]), _flat(self._identity["config"])
        changed = [
            f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not any(f"{name}.".startswith(f"{free}.") for free in FREE_FIELDS)
        ]
        if changed:
            raise ResumeError(
                f"checkpoint {step} was made with another config ({'; '.join(changed)}); restore these values, or use "
                "another --workdir"
            )


def load_model(workdir: str) -> tuple[Transformer, ConfigDict, int]:
    """The model of a workdir's newest checkpoint, on this process's first device: (model, the run's config, step).

    Raises:
      ResumeError: there is no checkpoint, or not one of this trainer.
    """
    with ocp.training.Checkpointer(_folder(workdir)) as checkpointer:
        if checkpointer.latest is None:
            raise ResumeError(f"there is no checkpoint in {workdir}/checkpoints")
        step = checkpointer.latest.step
        config = ConfigDict(_custom_metadata(checkpointer, step)["config"])
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        state = jax.eval_shape(lambda: init_state(config, make_optimizer(config)))
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
        params = checkpointer.load(step, state).params
    return nnx.merge(model_graph(model_config(config)), params), config, step


def _folder(workdir: str) -> epath.Path:
    """Where the checkpoints are; absolute, because Orbax fails on relative paths, and only once it saves."""
    return epath.Path(workdir if "://" in workdir else os.path.abspath(workdir)) / "checkpoints"


def _custom_metadata(checkpointer: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    metadata = checkpointer.metadata(step).custom_metadata
    if not isinstance(metadata, dict) or "config" not in metadata:
        raise ResumeError(f"checkpoint {step} was not written by this trainer; use another --workdir")
    return metadata


def abstract_state(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """ShapeDtypeStructs with concrete shardings, from a state traced by `jax.eval_shape` under the mesh."""

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(concrete, state)


def check_workdir(workdir: str) -> None:
    """Makes the workdir and what is missing above it, and proves that it can be written to.

    Raises:
      ResumeError: it cannot.
    """
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{os.getpid()}-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ResumeError(f"--workdir={workdir} cannot be written to: {error}") from error


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
