"""Checksums of a checkpoint's files, and a digest of its arrays.

Orbax loads a flipped bit of array data silently. So each complete checkpoint `40/` gets a file `40.checksums.json`
beside it: size and CRC-32 of every file, which name the file that changed. The digest is the same on every mesh; it is
kept in the checkpoint itself, so that what arrives on the devices can be compared with what left them.
"""

import concurrent.futures
import functools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax import Array

from trainer.checkpoints.disk import retried, root_cause

SUFFIX = ".checksums.json"
_CHUNK_BYTES = 1 << 20
_THREADS = 8
_BLOCK_ROWS = 256


class Checksum(NamedTuple):
    """Of one file."""

    size: int  # bytes
    crc32: int


class Seal(NamedTuple):
    """What a complete checkpoint consisted of when it was read back."""

    loss: float | None  # validation loss of its step, nats per token
    files: dict[str, Checksum]  # by path inside the checkpoint


class DamagedError(Exception):
    """What is wrong with a checkpoint, and with which file."""


def seal_path(folder: epath.Path) -> epath.Path:
    """Where the seal of the checkpoint in `folder` is."""
    return folder.parent / f"{folder.name}{SUFFIX}"


def list_files(folder: epath.Path) -> list[str]:
    """Paths of all files in `folder`, relative to it, sorted."""
    found = []
    for path in folder.iterdir():
        found += [f"{path.name}/{inner}" for inner in list_files(path)] if path.is_dir() else [path.name]
    return sorted(found)


def checksums(folder: epath.Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Reads files of `folder`, several at a time.

    Raises:
      OSError: a file cannot be read.
    """
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # crc32 and reading let other threads run
        return dict(zip(names, pool.map(lambda name: retried(lambda: _checksum(folder / name)), names), strict=True))


def write_seal(folder: epath.Path, seal: Seal) -> None:
    """Writes the seal of `folder`, and reads it back.

    Raises:
      OSError: it could not be written.
      DamagedError: something else came back.
    """
    body = json.dumps({"loss": seal.loss, "files": {name: list(c) for name, c in seal.files.items()}}, sort_keys=True)
    path = seal_path(folder)
    temporary = path.parent / f"{path.name}.tmp"

    def write() -> None:
        temporary.write_text(json.dumps({"crc32": zlib.crc32(body.encode()), "body": body}))
        temporary.replace(path)

    retried(write)
    if read_seal(folder) != seal:
        raise DamagedError(f"{path} reads back differently from what was written")


def read_seal(folder: epath.Path) -> Seal | None:
    """The seal of `folder`; None if it has none, because its save was interrupted after the checkpoint itself.

    Raises:
      DamagedError: it is damaged, or cannot be read.
    """
    path = seal_path(folder)
    try:
        text = retried(path.read_text)
        content = json.loads(text)
        if zlib.crc32(content["body"].encode()) != content["crc32"]:
            raise ValueError("its own checksum does not match")
        body = json.loads(content["body"])
        return Seal(body["loss"], {name: Checksum(*checksum) for name, checksum in body["files"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path.name} cannot be read: {root_cause(error)}") from error


def check_files(folder: epath.Path, seal: Seal, share: slice = slice(None)) -> None:
    """Compares the files of `folder` with its seal; `share` picks some of them.

    Raises:
      DamagedError: names the first file that is missing, unreadable or changed. Files that the seal does not name are
        none of its business.
    """
    expected = dict(sorted(seal.files.items())[share])
    try:
        found = checksums(folder, expected)
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, checksum in expected.items():
        if found[name].size != checksum.size:
            raise DamagedError(f"{folder / name} has {found[name].size} bytes instead of {checksum.size}")
        if found[name] != checksum:
            raise DamagedError(f"{folder / name} was changed: its CRC-32 is not {checksum.crc32:08x}")


def digest(state: Any) -> dict[str, int]:
    """A number below 2^32 for each array of a pytree, by its path: the same on every mesh, another after any bit flip.

    All hosts must call it alike, for the arrays span them.
    """
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    leaves = jax.tree.leaves(state)
    shardings = [leaf.sharding for leaf in leaves]
    if all(isinstance(sharding, jax.NamedSharding) for sharding in shardings):
        digests = _mesh_digests(shardings[0].mesh, tuple(sharding.spec for sharding in shardings))(leaves)
    else:
        digests = _device_digests(leaves)
    return dict(zip(names, jax.device_get(digests).tolist(), strict=True))


def shard_digest(x: Array, starts: Sequence[Array | int], shape: Sequence[int]) -> Array:
    """uint32 scalar: the bits of a shard's elements times odd weights, summed modulo 2^32. Those of all shards add up
    to the whole array's.

    Args:
      x: The shard, on one device.
      starts: Where it begins in each dimension of the whole array.
      shape: Of the whole array.
    """
    x, starts, shape = (x, starts, shape) if x.ndim else (x[None], (0,), (1,))
    *leading, width = x.shape
    row, stride = jnp.zeros(leading, jnp.uint32), shape[-1]  # index of each row's first element
    for axis in reversed(range(len(leading))):
        position = starts[axis] + jax.lax.broadcasted_iota(jnp.uint32, leading, axis)
        row, stride = row + position * jnp.uint32(stride % 2**32), stride * shape[axis]
    column = starts[-1] + jnp.arange(width, dtype=jnp.uint32)

    def block_digest(block: tuple[Array, Array]) -> Array:
        values, rows = block
        bits = jax.lax.bitcast_convert_type(values, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        # An odd factor keeps every bit's change visible; the multiplier spreads neighbours, so that swaps are seen too.
        weight = (rows[:, None] + column) * jnp.uint32(2_654_435_761) | jnp.uint32(1)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    # Block by block: CPUs would otherwise keep all products, a copy of the array, and take five times as long.
    count = math.prod(leading)
    rows = math.gcd(count, _BLOCK_ROWS)
    blocks = x.reshape(count // rows, rows, width), row.reshape(count // rows, rows)
    return jnp.sum(jax.lax.map(block_digest, blocks), dtype=jnp.uint32)


@jax.jit
def _device_digests(leaves: list[Array]) -> Array:
    return jnp.stack([shard_digest(x, (0,) * x.ndim, x.shape) for x in leaves])


@functools.cache
def _mesh_digests(mesh: jax.sharding.Mesh, specs: tuple[jax.P, ...]) -> Callable[[list[Array]], Array]:
    def digests(leaves: list[Array]) -> Array:
        def local(shards: list[Array]) -> Array:
            found = [
                _first_replica_digest(x, spec, leaf.shape) for x, spec, leaf in zip(shards, specs, leaves, strict=True)
            ]
            return jax.lax.psum(jnp.stack(found), mesh.axis_names)

        return jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=jax.P(), check_vma=False)(leaves)

    return jax.jit(digests)


def _first_replica_digest(shard: Array, spec: jax.P, shape: tuple[int, ...]) -> Array:
    """Inside `shard_map`: of this device's shard, 0 on all but the first of the devices that hold it."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    axes += [()] * (len(shape) - len(axes))
    starts = [jax.lax.axis_index(names) * size if names else 0 for names, size in zip(axes, shard.shape, strict=True)]
    others = tuple(name for name in mesh.axis_names if name not in sum(axes, ()))
    value = shard_digest(shard, starts, shape)
    return jnp.where(jax.lax.axis_index(others) == 0, value, 0) if others else value


def _checksum(path: epath.Path) -> Checksum:
    size, crc = 0, 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return Checksum(size, crc)
