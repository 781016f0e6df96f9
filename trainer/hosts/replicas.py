"""Are the replicas of the parameters bit-equal? A chip that computes wrongly is silent otherwise."""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from trainer.checkpoints.digest import shard_digest
from trainer.errors import ReplicaError
from trainer.mesh import AXES


def make_replica_check(params: nnx.State, mesh: Mesh) -> Callable[[nnx.State, int], None]:
    """`check(params, step)`, called by all hosts alike, raises ReplicaError naming the devices that differ from the
    others which hold the same shards, and the first parameter that differs.

    `params` gives shapes and shardings. Every device sums up the bits of its own shards, so nothing moves but
    one uint32 per device and parameter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    specs = [leaf.sharding.spec for _, leaf in leaves]

    def digests(*shards: Array) -> Array:
        own = jnp.stack([shard_digest(shard, (0,) * shard.ndim, shard.shape) for shard in shards])
        return jax.lax.all_gather(own, AXES)

    digest = jax.jit(jax.shard_map(digests, mesh=mesh, in_specs=tuple(specs), out_specs=jax.P(), check_vma=False))

    def check(params: nnx.State, step: int) -> None:
        values = jax.device_get(digest(*jax.tree.leaves(params)))  # [devices, parameters]
        devices = mesh.devices.flatten()
        for number, (name, spec) in enumerate(zip(names, specs, strict=True)):
            used = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
            groups = collections.defaultdict(list)
            for position, coordinates in enumerate(np.ndindex(mesh.devices.shape)):
                groups[tuple(c for c, axis in zip(coordinates, AXES, strict=True) if axis in used)].append(position)
            for group in groups.values():
                (usual, count), *others = collections.Counter(values[group, number].tolist()).most_common()
                if not others:
                    continue
                odd = [position for position in group if values[position, number] != usual]
                suspects = group if 2 * count <= len(group) else odd
                described = ", ".join(f"{devices[p]} of host {devices[p].process_index}" for p in suspects)
                raise ReplicaError(
                    f"after step {step} the replicas of {name} are not equal: {described} "
                    f"{'differ among each other' if suspects is group else f'differs from {count} others'}. This is "
                    "silent corruption by a chip or its memory; checkpoints from before it are sound. Replace the "
                    "machine, then run the same command again"
                )

    return check
