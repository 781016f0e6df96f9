"""What a host asks of all: a small array that goes into each step and comes back with its metrics, the same for all."""

import enum

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from numpy.typing import ArrayLike

from trainer.mesh import AXES


class Request(enum.IntEnum):
    """What a host can ask: the columns of a step's `requests`."""

    STOP = 0  # it was told to stop
    SAVE = 1  # a checkpoint is due by the clock
    SAVE_AGAIN = 2  # its part of the last save failed
    PROFILE = 3  # somebody asked it for a trace


def request_sharding(mesh: Mesh) -> NamedSharding:
    """One row on every device."""
    return NamedSharding(mesh, jax.P(AXES))


def request_array(mesh: Mesh, asked: ArrayLike = 0) -> Array:
    """int32 [devices, len(Request)]. The rows of this host's devices are `asked`, one row for all of them or one for
    each: hosts may differ, which is the point.
    """
    devices = mesh.local_devices
    rows = np.broadcast_to(np.asarray(asked, np.int32), (len(devices), len(Request)))
    shards = [jax.device_put(row[None], device) for row, device in zip(rows, devices, strict=True)]
    return jax.make_array_from_single_device_arrays((mesh.size, len(Request)), request_sharding(mesh), shards)
