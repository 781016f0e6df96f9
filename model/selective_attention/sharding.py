"""Logical axes: names for the dimensions of arrays, and the rule from each name to axes of the mesh.

The model runs under a mesh with Explicit axes (`jax.make_mesh`'s default), set by `jax.set_mesh`, or with none at
all. With Explicit axes shardings are part of an array's type: a program that XLA could only partition by guessing is
refused when it is traced.
"""

import math

import jax
from jax import Array, P
from jax.sharding import AxisType

AXES = DATA, FSDP, CONTEXT, TENSOR = ("data", "fsdp", "context", "tensor")  # of the mesh, in its order
# Several mesh axes shard one dimension together, in this order. A name that is not listed is never sharded.
RULES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "sequence": (CONTEXT,),
    "vocab": (TENSOR,),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "mlp": (TENSOR,),
}

Axes = tuple[str | None, ...]


def partition_spec(axes: Axes, shape: tuple[int, ...] | None = None) -> P | None:
    """The spec of an array with these logical axes on the mesh that is set; None if none is.

    Args:
      axes: the logical name of each dimension, None for one that is never sharded.
      shape: if given, a dimension that the mesh axes do not divide is left unsharded (one key/value head on four
        tensor shards, say), instead of being refused by JAX.

    Raises:
      ValueError: the mesh has Auto axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if any(kind == AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"the model needs a mesh with Explicit axes, jax.make_mesh's default; got {mesh}")
    parts: list[tuple[str, ...] | None] = []
    for dimension, name in enumerate(axes):
        names = tuple(n for n in RULES.get(name or "", ()) if n in mesh.shape)
        if shape is not None and shape[dimension] % math.prod(mesh.shape[n] for n in names):
            names = ()
        parts.append(names or None)
    return P(*parts)


def reshard(x: Array, *axes: str | None) -> Array:
    """`x` laid out as its logical axes say; `x` itself when no mesh is set."""
    spec = partition_spec(axes, x.shape)
    return x if spec is None else jax.reshard(x, spec)
