"""Keys and values as int8 with scales: what a cache of half bfloat16's bytes holds.

A head's key or value of one token is D whole numbers from -127 to 127 times a scale of its own: heads and tokens differ
in size, and one that is large must not coarsen the others. The scale is rounded to bfloat16 before anything is divided
by it, so that it adds no error of its own.

Shape letters: the package's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LARGEST = 127
SCALE_BYTES = 2  # bfloat16's
CACHE_DTYPES = ("float32", "bfloat16", "int8")  # by their names


class Quantised(NamedTuple):
    """Rows of D numbers, values times scale."""

    values: Array  # int8 [..., D]
    scale: Array  # bfloat16 [...]

    def floats(self, dtype: Any) -> Array:
        """The numbers [..., D]; in bfloat16 rounded once more."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return (self.values.astype(wide) * self.scale[..., None].astype(wide)).astype(dtype)


def quantise(x: Array) -> Quantised:
    """The nearest whole multiples of 1 / 127 of each row's largest number, about; x is [..., D]."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = bfloat16_scale(jnp.max(jnp.abs(wide), axis=-1))
    divisor = jnp.where(scale == 0, 1, scale)[..., None].astype(wide.dtype)
    return Quantised(jnp.round(wide / divisor).astype(jnp.int8), scale.astype(jnp.bfloat16))


def bfloat16_scale(largest: Array) -> Array:
    """A 127th of these numbers in float32, rounded to what bfloat16 has: by 1/512 at most, so that 127 stays 127."""
    bits = jax.lax.bitcast_convert_type((largest / LARGEST).astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)


def is_int8(dtype: Any) -> bool:
    """Whether a cache of this dtype holds `Quantised` keys and values."""
    return jnp.dtype(dtype) == jnp.int8


def check_cache_dtype(dtype: Any, of_model: Any) -> Any:
    """The dtype of keys and values in a cache, by default the model's.

    Raises:
      ValueError: a cache cannot hold them so.
    """
    try:
        found = jnp.dtype(of_model if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not (is_int8(found) or jnp.issubdtype(found, jnp.floating)):
        raise ValueError(f"a cache cannot hold keys and values in {dtype!r}; choose one of {', '.join(CACHE_DTYPES)}")
    return found


def selecting_dtype(dtype: Any, of_model: Any) -> Any:
    """The dtype of the selecting head's own keys in a cache of `dtype`.

    Not int8, which the model's takes the place of: it is one head, whose choices every other has to live with.
    """
    return jnp.dtype(of_model) if is_int8(dtype) else jnp.dtype(dtype)


def as_held(x: Array, dtype: Any) -> Array:
    """Keys or values [..., D] as a cache of this dtype gives them back, in x's own dtype."""
    if is_int8(dtype):
        return quantise(x).floats(x.dtype)
    kind = jnp.finfo(dtype)
    if kind.bits >= jnp.finfo(x.dtype).bits:
        return x
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)  # which XLA may not leave out, unlike two casts
