"""The local tier: between the workdir's checkpoints each host keeps its part of the state on storage of its own.

In `checkpoint.local_folder`, `<run>/host-1/40/` holds all shards of step 40 that host 1 holds, and those of the host
before which it does not, so that what is lost with one host's storage is still there. `40.checksums.json` is its seal,
as in the workdir. Only the newest is kept, and the one before while it is written. It serves the same mesh on the same
hosts; for anything else, and whenever something does not fit, there are the workdir's checkpoints.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import Array

from trainer.checkpoints.checksums import DamagedError, check_files, read_seal
from trainer.checkpoints.digest import digest
from trainer.checkpoints.disk import explain
from trainer.checkpoints.folder import Metadata, list_steps, seal_checkpoint
from trainer.errors import ConfigError, ReplicaError, ResumeError
from trainer.hosts.gather import Gatherer
from trainer.hosts.replicas import make_replica_check
from trainer.hosts.ring import Index, Ring, shard_indices
from trainer.state import TrainState

Shards = dict[tuple[int, Index], np.ndarray]  # by the number of the state's leaf, and the place in it
logger = logging.getLogger("trainer")

_ARRAYS, _METADATA = "arrays", "metadata.json"


class LocalCheckpoints:
    """This host's part of the newest state. All hosts call `save` and `restore` alike; a write goes on in a thread."""

    def __init__(self, local_folder: str, workdir: epath.Path, hosts: Gatherer) -> None:
        """Makes the folder.

        Raises:
          ConfigError: it cannot be made.
        """
        run = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
        self._folder = epath.Path(local_folder) / f"trainer-{run}" / f"host-{jax.process_index()}"
        self._hosts = hosts
        self.newest: int | None = None  # the step of the last one that this process wrote or read
        self._thread: threading.Thread | None = None
        self._layout_digest: str | None = None
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--config.checkpoint.local_folder={local_folder} cannot be used on host {jax.process_index()}: "
                f"{error}; give a folder of this machine, such as /dev/shm"
            ) from error

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any], base: int | None) -> None:
        """Copies this host's part, after the write before has ended, and begins to write it. A write that fails is
        named in a warning, and no more.

        Args:
          step: Updates done.
          state: May be donated as soon as this returns.
          metadata: As the workdir's checkpoints have it.
          base: The workdir's newest checkpoint, to which this adds.
        """
        self.join()
        shards = _copy(state)
        content = {**metadata, "digest": digest(state), "layout": self._layout(state), "base": base}
        self._thread = threading.Thread(target=self._write, args=(step, shards, content), name="local checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Returns when the last write has ended."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def restore(
        self, abstract: TrainState, base: int, check: Callable[[int, Metadata], None]
    ) -> tuple[int, TrainState, Metadata] | None:
        """Step, state and metadata of the newest one that is whole and newer than `base`, the workdir's newest
        checkpoint; None if there is none. Others are named in a warning.

        Args:
          abstract: ShapeDtypeStructs with shardings.
          base: The same on all hosts.
          check: Given step and metadata, raises ResumeError where the run may not go on from there.
        """
        self.join()
        found = self._hosts.gather(list_steps(self._folder))
        for step in sorted({step for steps in found for step in steps if step > base}, reverse=True):
            try:
                state, metadata = self._restore(step, abstract, base, check)
            except (DamagedError, ResumeError, ReplicaError) as error:
                if jax.process_index() == 0:
                    logger.warning("local checkpoint %d is not used: %s", step, error)
                continue
            self.newest = step
            return step, state, metadata
        return None

    def forget(self, after: int | None = None) -> None:
        """Removes what is newer than step `after`, or everything, the folder too."""
        self.join()
        if after is not None:
            self._remove({step for step in list_steps(self._folder) if step <= after})
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # hosts on one machine share it
            os.rmdir(self._folder.parent)

    def _restore(
        self, step: int, abstract: TrainState, base: int, check: Callable[[int, Metadata], None]
    ) -> tuple[TrainState, Metadata]:
        """One of them; all hosts alike raise what says why not: DamagedError, ResumeError, ReplicaError."""
        shards, metadata, problem = Shards(), None, None
        try:
            shards, metadata = self._read(step)
        except (DamagedError, OSError) as error:
            problem = f"host {jax.process_index()}: {error}"
        answers = self._hosts.gather(problem)
        problems = {host: text for host, text in enumerate(answers) if text is not None}
        if None not in answers:
            raise DamagedError("; ".join(problems.values()))
        source = answers.index(None)  # it speaks for all: what all say may be more than one message holds
        metadata = self._hosts.gather(metadata if jax.process_index() == source else None)[source]
        if metadata["layout"] != self._layout(abstract):
            raise DamagedError("it was made on another mesh, or by another number of hosts")
        if metadata["base"] is None or metadata["base"] > base:
            raise DamagedError("the checkpoints of the workdir that it adds to are not there")
        check(step, metadata)
        leaves = jax.tree.leaves(abstract)
        mesh = leaves[0].sharding.mesh
        ring = Ring(mesh)
        for host in problems:
            if ring.next(host) in problems:
                raise DamagedError(f"{problems[host]}; the copy of {problems[ring.next(host)]}")
        arrays = [_assemble(ring, leaf, number, shards, problems) for number, leaf in enumerate(leaves)]
        state = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
        changed = [name for name, value in digest(state).items() if metadata["digest"].get(name) != value]
        if changed:
            raise DamagedError(f"the array {changed[0]} is not the one that was saved")
        make_replica_check(state, mesh)(state, step)  # hosts have read their own, which the digest sees one of
        if jax.process_index() == 0:
            for host, text in problems.items():
                logger.warning(
                    "local checkpoint %d: host %d's part comes from host %d; %s", step, host, ring.next(host), text
                )
        return state, metadata

    def _layout(self, state: TrainState) -> str:
        self._layout_digest = self._layout_digest or _layout(state)  # the same for all of a run
        return self._layout_digest

    def _read(self, step: int) -> tuple[Shards, Metadata]:
        folder = self._folder / str(step)
        seal = read_seal(folder)
        if seal is None:
            raise DamagedError(f"there is no complete {folder}")
        check_files(folder, seal)
        metadata = json.loads((folder / _METADATA).read_text())
        with open(folder / _ARRAYS, "rb") as stream:
            shards = {(number, tuple(map(tuple, index))): np.load(stream) for number, index in metadata.pop("shards")}
        return shards, metadata

    def _write(self, step: int, shards: Shards, metadata: Metadata) -> None:
        """In a thread of its own."""
        try:
            # When hosts copy this step, all have ended writing the one before: nothing older is needed any more.
            self._remove({self.newest})
            folder = self._folder / str(step)
            os.makedirs(folder, mode=0o700)
            with open(folder / _ARRAYS, "wb") as stream:
                for array in shards.values():
                    np.save(stream, array, allow_pickle=False)
            (folder / _METADATA).write_text(json.dumps(metadata | {"shards": list(shards)}))
            seal_checkpoint(folder, metadata["loss"])
            self.newest = step
        except (OSError, DamagedError) as error:
            logger.warning("local checkpoint %d could not be written: %s", step, explain(error, self._folder))

    def _remove(self, kept: set[int | None]) -> None:
        """All but these steps, and what interrupted writes have left of others."""
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if path.name.partition(".")[0] not in {str(step) for step in kept}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy(state: TrainState) -> Shards:
    """All that this host holds, and what the host before holds besides."""
    leaves = jax.tree.leaves(state)
    ring, shards = Ring(leaves[0].sharding.mesh), Shards()
    for number, leaf in enumerate(leaves):
        _take(shards, number, leaf, shard_indices(leaf))
        if ring.brings_something(leaf):  # one array after the other, since a second state may not fit the devices
            _take(shards, number, ring.forward(leaf), ring.brought(leaf))
    return shards


def _take(shards: Shards, number: int, x: Array, places: Mapping[jax.Device, Index]) -> None:
    for shard in x.addressable_shards:
        key = number, places[shard.device]
        if key not in shards:
            shards[key] = np.array(shard.data)  # a copy: the next step uses the devices' memory again


def _assemble(ring: Ring, leaf: jax.ShapeDtypeStruct, number: int, shards: Shards, lost: Container[int]) -> Array:
    """An array of the state from the shards that hosts have read; those `lost` have theirs from the next host."""
    array = _array(leaf, number, shards, shard_indices(leaf))
    if not lost:
        return array
    copies = ring.back(_array(leaf, number, shards, ring.brought(leaf)))
    source = copies if jax.process_index() in lost else array
    parts = [shard.data for shard in source.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _array(leaf: jax.ShapeDtypeStruct, number: int, shards: Shards, places: Mapping[jax.Device, Index]) -> Array:
    missing = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    parts = [
        jax.device_put(shards.get((number, places[device]), missing).view(leaf.dtype), device)
        for device in leaf.sharding.mesh.local_devices
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _layout(state: TrainState) -> str:
    """What must be the same for shards to fit: arrays, and which part of them each host holds."""
    described = [
        (
            jax.tree_util.keystr(path),
            str(leaf.dtype),
            sorted((device.process_index, index) for device, index in shard_indices(leaf).items()),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()
