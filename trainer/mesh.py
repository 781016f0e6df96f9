"""The mesh: four named axes over all devices, several slices along `data`."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from configs import base
from selective_attention.sharding import AXES
from trainer.errors import ConfigError

_EMULATION_HINT = "; CPUs can emulate 8: XLA_FLAGS=--xla_force_host_platform_device_count=8"


def mesh_shape(sizes: base.Mesh, num_devices: int, hint: str = "", num_slices: int = 1) -> tuple[int, ...]:
    """Devices along each of AXES, with a -1 filled in; `hint` ends the message about another number of devices.

    Where `data` is -1 and a slice has fewer devices than `fsdp` asks for, `fsdp` takes what there are.

    Raises:
      ConfigError: the sizes do not multiply to `num_devices`.
    """
    shape = [getattr(sizes, axis) for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ConfigError(f"mesh {asked}: sizes must be at least 1, and only one may be -1")
    if sizes.data == -1 and sizes.fsdp > 1:
        shape[1] = min(sizes.fsdp, max(1, num_devices // num_slices // math.prod(shape[2:])))
    if -1 in shape:
        fixed = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = num_devices // fixed
    if math.prod(shape) != num_devices:
        raise ConfigError(
            f"mesh {asked} does not fit the {num_devices} devices; change --config.mesh.* so that the product is "
            f"{num_devices}{hint}"
        )
    return tuple(shape)


def make_mesh(sizes: base.Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with Explicit axes over `devices` (default: all), laid out for the slice's network.

    Explicit axes make shardings part of the types. That is why they were chosen: on meshes of three axes XLA's
    propagation can silently compute wrong gradients where a program leaves a sharding open; here such a program does
    not trace.

    Raises:
      ConfigError: as `mesh_shape`, or `data` cannot hold the slices.
    """
    hint = _EMULATION_HINT if devices is None and jax.default_backend() == "cpu" else ""
    devices = list(jax.devices()) if devices is None else devices
    num_slices = len({getattr(d, "slice_index", 0) for d in devices})
    shape = mesh_shape(sizes, len(devices), hint, num_slices)
    if num_slices > 1:
        if shape[0] % num_slices:
            raise ConfigError(f"mesh data={shape[0]} must be a multiple of the {num_slices} slices, which it spans")
        within = (shape[0] // num_slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (num_slices, 1, 1, 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
