"""Every host has a next one: shards go round by a collective of all devices, over the network that is between them."""

import functools
from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import Mesh

from trainer.mesh import AXES

Index = tuple[tuple[int, int], ...]  # of a shard in its array: [start, stop) in each dimension


class Ring:
    """The hosts of a mesh, each followed by the next, the last by the first."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._devices = mesh, list(mesh.devices.flatten())
        places: dict[int, list[int]] = {}
        for place, device in enumerate(self._devices):
            places.setdefault(device.process_index, []).append(place)
        self.hosts = sorted(places)  # their numbers
        rows = [places[host] for host in self.hosts]
        following = [*rows[1:], rows[0]]
        self._pairs = [
            (a, b) for row, row_next in zip(rows, following, strict=True) for a, b in zip(row, row_next, strict=True)
        ]

    def next(self, host: int) -> int:
        """The host after this one."""
        return self.hosts[(self.hosts.index(host) + 1) % len(self.hosts)]

    def brings_something(self, x: jax.ShapeDtypeStruct | Array) -> bool:
        """Whether a host holds a shard of this array that its next one does not hold as well."""
        held: dict[int, set[Index]] = {}
        for device, index in shard_indices(x).items():
            held.setdefault(device.process_index, set()).add(index)
        return any(held[host] - held[self.next(host)] for host in self.hosts)

    def brought(self, x: jax.ShapeDtypeStruct | Array) -> dict[jax.Device, Index]:
        """Which shard of `x` each device holds in `forward(x)`: that of the host before."""
        indices = shard_indices(x)
        return {self._devices[b]: indices[self._devices[a]] for a, b in self._pairs}

    def forward(self, x: Array) -> Array:
        """Every shard, on a device of the next host, not as `x` was laid out; all hosts must call it alike."""
        return _permute(self._mesh, jax.typeof(x).sharding.spec, tuple(self._pairs))(x)

    def back(self, x: Array) -> Array:
        """Undoes `forward`."""
        return _permute(self._mesh, jax.typeof(x).sharding.spec, tuple((b, a) for a, b in self._pairs))(x)


def shard_indices(x: jax.ShapeDtypeStruct | Array) -> dict[jax.Device, Index]:
    """Which part of an array each device holds."""
    return _shard_indices(x.sharding, x.shape)


@functools.cache
def _shard_indices(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Index]:
    return {
        device: tuple((s.start or 0, size if s.stop is None else s.stop) for s, size in zip(index, shape, strict=True))
        for device, index in sharding.devices_indices_map(shape).items()
    }


@functools.cache
def _permute(mesh: Mesh, spec: jax.P, pairs: tuple[tuple[int, int], ...]) -> Callable[[Array], Array]:
    def permuted(shard: Array) -> Array:
        return jax.lax.ppermute(shard, AXES, pairs)

    return jax.jit(jax.shard_map(permuted, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
