"""One query a row over the slots of a cache: what decoding does in each layer.

On TPUs one kernel puts the token into its slot, attends and selects (`implementations/tpu/decode.py`), on slots laid
out for it; elsewhere XLA does, in three steps.

Shape letters: the package's; M slots of a cache, P the same with padding to whole tiles, W lanes of a slot's heads, T
shards of heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .implementations.tpu.columns import LANES, round_up
from .implementations.tpu.decode import decode
from .implementations.tpu.words import TILE, from_words, in_words, tile_slots
from .parallel import from_first_shard
from .quantised import is_int8, quantise
from .selection import HIDDEN, Projections, Selection, allowed, rectified
from .sharding import TENSOR


class Slots(NamedTuple):
    """What a layer holds."""

    k: Array  # [B, K, M, D], or [B, T, P, W] for the kernel
    v: Array  # the same
    k_sel: Array | None  # [B, 1, M, D] of the selecting head; None where head 0 selects
    position: Array | None  # int32 [B, M], of each slot's token; negative for an empty slot. None: slot m holds m
    f: Array | None  # float32 [B, M], F of this query; None if nothing selects
    # Of int8 keys and values, bfloat16 [B, K, 2, M], or for the kernel [B, T, S, M]: of the keys, then of the values.
    scale: Array | None = None


def slots_shape(
    batch: int, num_heads: int, num_slots: int, head_dim: int, *, fused: bool, dtype: Any
) -> tuple[int, ...]:
    """Of keys or values: [B, K, M, D], or for the kernel [B, T, P, W], the heads of a shard side by side.

    P is M in whole tiles of the cache's dtype; int8 slots lie in the order of `in_words`. T is the size of the mesh's
    axis of heads, if that divides them, else 1. XLA keeps rows of whole registers as they are; it would turn others
    around for each call of the kernel.
    """
    if not fused:
        return batch, num_heads, num_slots, head_dim
    shards = _shards(num_heads)
    return batch, shards, round_up(num_slots, tile_slots(dtype)), round_up(num_heads // shards * head_dim, LANES)


def scale_shape(batch: int, num_heads: int, num_slots: int, *, fused: bool) -> tuple[int, ...]:
    """Of the scales of int8 keys and values: [B, K, 2, M], or for the kernel [B, T, S, M], slots along lanes.

    So they lie as logits and weights do, which they are multiplied with. S is 2 K / T, rounded up to whole tiles.
    """
    if not fused:
        return batch, num_heads, 2, num_slots
    shards = _shards(num_heads)
    return batch, shards, round_up(2 * num_heads // shards, TILE), num_slots


def _shards(num_heads: int) -> int:
    tensor = jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1)
    return 1 if num_heads % tensor else tensor


def heads_as_slots(x_BNKD: Array, like: Array, *, fused: bool) -> Array:
    """Keys or values of N tokens in the first N slots of an array like this one; the other slots are zero."""
    batch, num_tokens = x_BNKD.shape[:2]
    slots = x_BNKD.reshape(batch, 1, num_tokens, -1) if fused else jnp.swapaxes(x_BNKD, 1, 2)
    widths = [(0, whole - part) for whole, part in zip(like.shape, slots.shape, strict=True)]
    slots = jnp.pad(slots, widths).astype(like.dtype)
    return in_words(slots) if fused and is_int8(like.dtype) else slots


def slots_as_heads(slots: Array, num_slots: int, head_dim: int, num_heads: int, *, fused: bool) -> Array:
    """Keys or values [B, M, K, D] of all slots."""
    if not fused:
        return jnp.swapaxes(slots, 1, 2)
    whole = from_words(slots) if is_int8(slots.dtype) else slots
    x_BMW = whole[:, 0, :num_slots, : num_heads * head_dim]
    return x_BMW.reshape(*x_BMW.shape[:2], num_heads, head_dim)


def scales_as_slots(k_BNK: Array, v_BNK: Array, like: Array, *, fused: bool) -> Array:
    """The scales of N tokens' keys and values in the first N slots of an array like this one; the others are zero."""
    scale_BK2N = jnp.moveaxis(jnp.stack([k_BNK, v_BNK], axis=-1), 1, 3)
    if fused:
        batch, _, _, num_tokens = scale_BK2N.shape
        scale_BK2N = jnp.swapaxes(scale_BK2N, 1, 2).reshape(batch, 1, -1, num_tokens)
    widths = [(0, whole - part) for whole, part in zip(like.shape, scale_BK2N.shape, strict=True)]
    return jnp.pad(scale_BK2N, widths).astype(like.dtype)


def slots_as_scales(scale: Array, num_heads: int, *, fused: bool) -> tuple[Array, Array]:
    """The scales [B, M, K] of all slots' keys and values."""
    if fused:
        rows = scale[:, 0, : 2 * num_heads]
        scale = jnp.swapaxes(rows.reshape(rows.shape[0], 2, num_heads, -1), 1, 2)
    k_BMK, v_BMK = jnp.moveaxis(scale, (2, 3), (0, 2))
    return k_BMK, v_BMK


def take_in(
    new: Projections,
    slots: Slots,
    slot_B: Array,
    now_B: Array,
    selection: Selection,
    *,
    fused: bool,
    heads_axis: str | None = None,
) -> tuple[Array, Slots, Array | None]:
    """Puts one token a row into its slot, lets its query attend, and adds what it selects to F.

    Args:
      new: the token's projections, N = 1.
      slots: what the layer holds.
      slot_B: int32 [B], each token's slot.
      now_B: int32 [B], its position. Slots of later positions are not seen.
      selection: the rule of F.
      fused: by the kernel, which needs `slots_shape` with `fused` and one shard of heads.
      heads_axis: the axis of a surrounding `shard_map` that heads are sharded over, if any.

    Returns:
      out [B, 1, H, D]; the slots afterwards, with F of the next query; and the attention weights [B, M], averaged over
      the heads, unless `fused`.
    """
    if not fused:
        return _take_in(new, slots, slot_B, now_B, selection, heads_axis)
    arrays = {name: x for name, x in slots._asdict().items() if x is not None}
    squeezed = {name: x[:, 0] if x.ndim == 4 else x for name, x in arrays.items()}
    alone = heads_axis is None
    out, after = decode(new, squeezed, slot_B, now_B, selection, adds=alone)
    after = {name: x.reshape(arrays[name].shape) for name, x in after.items()}
    if slots.f is not None and not alone:
        after["f"] = _emptied(slots.f, slot_B) + from_first_shard(after["f"], heads_axis)
    return out, slots._replace(**after), None


def _take_in(
    new: Projections, slots: Slots, slot_B: Array, now_B: Array, selection: Selection, heads_axis: str | None
) -> tuple[Array, Slots, Array]:
    k_BKD, v_BKD, scale = new.k[:, 0], new.v[:, 0], slots.scale
    slot_M = jnp.arange(slots.k.shape[2])
    if scale is not None:
        (k_BKD, k_BK), (v_BKD, v_BK) = quantise(k_BKD), quantise(v_BKD)
        here_BM = slot_M == slot_B[:, None]
        scale = jnp.where(here_BM[:, None, None], jnp.stack([k_BK, v_BK], axis=2)[..., None], scale)
    k_BKMD, v_BKMD = write(slots.k, k_BKD, slot_B), write(slots.v, v_BKD, slot_B)
    k_sel = None if slots.k_sel is None or new.k_sel is None else write(slots.k_sel, new.k_sel, slot_B)
    if slots.position is None:
        position_BM = jnp.broadcast_to(slot_M, (k_BKMD.shape[0], k_BKMD.shape[2]))
    else:
        position_BM = jnp.where(slot_M == slot_B[:, None], now_B[:, None], slots.position)
    f_BM = slots.f if slots.f is None or slots.position is None else _emptied(slots.f, slot_B)
    held = Slots(k_BKMD, v_BKMD, k_sel, position_BM, f_BM, scale)
    out, f_BM, weights_BM = _attend(new, now_B, held, selection, heads_axis)
    position = None if slots.position is None else position_BM
    return out, Slots(k_BKMD, v_BKMD, k_sel, position, f_BM, scale), weights_BM


def _emptied(f_BM: Array, slot_B: Array) -> Array:
    return jnp.where(jnp.arange(f_BM.shape[-1]) == slot_B[:, None], 0, f_BM)


def _attend(
    new: Projections, now_B: Array, slots: Slots, selection: Selection, heads_axis: str | None
) -> tuple[Array, Array | None, Array]:
    """Attention of one query a row, its own token among the slots: (out, F of the next query, weights [B, M])."""
    k_BKMD, v_BKMD, k_sel, slot_position_BM, f_BM, scales = slots
    q, q_sel = new.q, new.q_sel
    assert slot_position_BM is not None
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k_BKMD.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = head_dim**-0.5
    held_BM = (slot_position_BM >= 0) & (slot_position_BM <= now_B[:, None])
    q_BKGD = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    raw_BKGM = scale * jnp.einsum("bkgd,bkmd->bkgm", q_BKGD, k_BKMD, preferred_element_type=dtype)
    if scales is not None:
        raw_BKGM *= scales[:, :, :1]
    logits_BKGM = raw_BKGM if f_BM is None else raw_BKGM - f_BM[:, None, None]
    logits_BKGM = jnp.where(held_BM[:, None, None], logits_BKGM, -HIDDEN)
    weights_BKGM = jax.nn.softmax(logits_BKGM, axis=-1)
    if scales is None:
        mixing_BKGM = weights_BKGM.astype(v_BKMD.dtype)
    else:  # of a free slot the scale may be anything
        mixing_BKGM = jnp.where(held_BM[:, None, None], weights_BKGM * scales[:, :, 1:], 0).astype(q.dtype)
    out_BKGD = jnp.einsum("bkgm,bkmd->bkgd", mixing_BKGM, v_BKMD, preferred_element_type=dtype)
    out = out_BKGD.reshape(batch, 1, num_heads, head_dim).astype(q.dtype)
    weights_BM = jnp.mean(weights_BKGM, axis=(1, 2))
    if selection is Selection.OFF or f_BM is None:
        return out, f_BM, weights_BM
    if q_sel is None or k_sel is None:
        selecting_BM = raw_BKGM[:, 0, 0]
    else:
        selecting_BM = scale * jnp.einsum("bnd,bsmd->bm", q_sel, k_sel, preferred_element_type=dtype)
    allowed_BM = held_BM & allowed(now_B[:, None], slot_position_BM, slot_position_BM == 0, selection)
    s_BM = jnp.where(allowed_BM, rectified(selecting_BM, selection), 0)
    return out, f_BM + from_first_shard(s_BM, heads_axis), weights_BM


def write(slots_BKMD: Array, new_BKD: Array, slot_B: Array) -> Array:
    """The slots with each row's `slot_B` replaced, in the way that is fast on the platform."""

    def scatter(slots_BKMD, new_BKD, slot_B):
        # Heads as rows, and without a check of bounds: in any other form XLA's CPU backend copies the cache of one row.
        (batch, heads), slots = slots_BKMD.shape[:2], slots_BKMD.reshape(-1, *slots_BKMD.shape[2:])
        here = slots.at[jnp.arange(batch * heads), jnp.repeat(slot_B, heads)]
        new = new_BKD.reshape(-1, new_BKD.shape[2])
        return here.set(new, unique_indices=True, mode="promise_in_bounds").reshape(slots_BKMD.shape)

    def choose(slots_BKMD, new_BKD, slot_B):  # fuses into the attention that reads it; a scatter would copy the cache
        here_BM = jnp.arange(slots_BKMD.shape[2]) == slot_B[:, None]
        return jnp.where(here_BM[:, None, :, None], new_BKD[:, :, None], slots_BKMD)

    new_BKD = new_BKD.astype(slots_BKMD.dtype)
    return jax.lax.platform_dependent(slots_BKMD, new_BKD, slot_B, tpu=choose, default=scatter)
