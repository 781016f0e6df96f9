"""Matmuls of activations with parameters on a mesh.

`Contraction` reads an einsum's two transposes off its subscripts, for who makes a backward pass by hand.

Shape letters: the package's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from ..implementations.tpu.columns import LANES
from ..implementations.tpu.rotary import EPSILON
from ..remat import keep
from ..sharding import FSDP, Axes, partition_spec, reshard


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An einsum of activations with a weight, and the logical axes of the weight and of the result."""

    subscripts: str  # such as bne,ehd->bnhd
    weight_axes: Axes
    out_axes: Axes

    @property
    def letters(self) -> tuple[str, str, str]:
        """Of activations, weight and result."""
        operands, result = self.subscripts.split("->")
        x, weight = operands.split(",")
        return x, weight, result

    @property
    def x_axes(self) -> Axes:
        """Of the activations: those of a gathered weight along what is contracted."""
        x, weight, _ = self.letters
        gathered = dict(zip(weight, self.gathered_axes, strict=True))
        return "batch", "sequence", *(gathered[letter] for letter in x[2:])

    @property
    def gathered_axes(self) -> Axes:
        return tuple(None if a == "embed" else a for a in self.weight_axes)

    def gathered(self, weight: Array) -> Array:
        """`weight`, whole along fsdp.

        Where shards of a projection to or from heads are narrow, the TPU compiler lays heads along lanes, which leaves
        half of them empty, in what is gathered and in all matmuls with it. So these travel with heads and their width
        as one dimension. What is gathered has `embed` along lanes, and so has its gradient; it is kept for the backward
        pass, since the compiler does not gather beside other work what it has to turn.
        """
        spec, embed = partition_spec(self.gathered_axes, weight.shape), self.weight_axes.index("embed")
        if spec is None or weight.ndim < 3 or shard_width(weight.shape[embed]) >= LANES // 2:
            return reshard(weight, *self.gathered_axes)
        heads, width = (n for n in range(weight.ndim) if n != embed)
        shape, axes = [weight.shape[embed], -1], [None, spec[heads]]
        order = slice(None, None, -1 if embed else 1)
        folded = jax.reshard(weight.reshape(shape[order]), jax.P(*axes[order]))
        whole = folded.reshape(weight.shape, out_sharding=spec)
        turned = functools.partial(with_layout_constraint, layouts=Layout((heads, width, embed)))
        return keep(jax.lax.platform_dependent(whole, tpu=turned, default=lambda x: x))

    def apply(self, x: Array, gathered: Array) -> Array:
        return _einsum(self.subscripts, x, gathered, self.out_axes)

    def input_gradient(self, d_out: Array, gathered: Array) -> Array:
        x, weight, out = self.letters
        return _einsum(f"{out},{weight}->{x}", d_out, gathered, self.x_axes)

    def weight_gradient(self, x: Array, d_out: Array) -> Array:
        letters, weight, out = self.letters
        whole = _einsum(f"{letters},{out}->{weight}", x, d_out, self.gathered_axes)
        return reshard(whole, *self.weight_axes)


def shard_width(embed: int) -> int:
    """How much of a weight's `embed` each device holds on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape.get(FSDP, 1)
    return embed if embed % shards else embed // shards


def _einsum(subscripts: str, a: Array, b: Array, out_axes: Axes) -> Array:
    operands, result = subscripts.split("->")
    sizes = dict(zip(operands.replace(",", ""), a.shape + b.shape, strict=True))
    spec = partition_spec(out_axes, tuple(sizes[letter] for letter in result))
    return jnp.einsum(subscripts, a, b, out_sharding=spec)


def contraction(subscripts: str, weight: nnx.Param, out_axes: Axes) -> Contraction:
    """Of activations with a layer's slice of this parameter."""
    rank = len(subscripts.split("->")[0].split(",")[1])
    return Contraction(subscripts, weight.axes[-rank:], out_axes)  # a layer's slice has lost the leading L


def contract(subscripts: str, x: Array, weight: nnx.Param, *out_axes: str | None) -> Array:
    """einsum of activations with a parameter in the activations' dtype, gathered over fsdp; result laid out by
    `out_axes`.
    """
    one = contraction(subscripts, weight, out_axes)
    return one.apply(x, one.gathered(weight[...].astype(x.dtype)))


def rms_norm(x: Array, scale: Array, epsilon: float = EPSILON) -> Array:
    """RMSNorm over the last axis, computed in float32 (or x's dtype, if wider); returns x's dtype."""
    return (wide(x) * inverse_rms(x, epsilon) * scale).astype(x.dtype)


def wide(x: Array) -> Array:
    """`x` in float32, or its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inverse_rms(x: Array, epsilon: float) -> Array:
    """By what RMSNorm multiplies: over the last axis, which stays as 1; kept for the backward pass."""
    return keep(jax.lax.rsqrt(jnp.mean(wide(x) * wide(x), axis=-1, keepdims=True) + epsilon))
