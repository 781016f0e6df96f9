"""A decoder-only transformer with selective attention (Flax NNX).

Pre-norm RMSNorm, QK normalisation, SwiGLU, no biases (section 4 of the paper). The layers are one `Block` whose
parameters have a leading axis L; the forward pass scans over it, so that compile time does not grow with depth, or
takes the layers one by one (`scan_layers`).

Shape letters: the package's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from ..attention import AttentionOptions
from ..implementations.tpu.columns import LANES
from ..implementations.tpu.rotary import norm_rotary, norm_rotary_tokens
from ..parallel import sharded_selective_attention, zigzag_positions
from ..remat import keep, rematerialised
from ..selection import Selection, selection_mask
from ..sharding import CONTEXT, Axes, partition_spec, reshard
from .config import RotaryScaling, TransformerConfig
from .embedding import lookup
from .projection import contract, rms_norm
from .swiglu import normalised_swiglu

# (q [B, N, H, D], k [B, N, K, D], v [B, N, K, D], q_sel, k_sel [B, N, D] or None) -> (out [B, N, H, D], anything)
Attend = Callable[[Array, Array, Array, Array | None, Array | None], tuple[Array, Any]]


def attending(config: TransformerConfig, options: AttentionOptions) -> Attend:
    """Selective attention as the config says, on the mesh that is set; adds the memory statistic where it is wanted."""

    def attend(q: Array, k: Array, v: Array, q_sel: Array | None, k_sel: Array | None) -> tuple[Array, Any]:
        mine = AttentionOptions(
            q_sel=q_sel, k_sel=k_sel, selection=config.selection, implementation=config.attention, **options
        )
        result = sharded_selective_attention(q, k, v, **mine)
        return result if isinstance(result, tuple) else (result, None)

    return attend


def masking(config: TransformerConfig, position_N: np.ndarray, reduce: Callable[[Array], Any]) -> Attend:
    """Selective attention that adds `reduce(F)`, where F is [B, N, N] in the order of the text."""
    back_N = np.argsort(position_N)

    def whole(x_BND: Array) -> Array:
        return reshard(permute(reshard(x_BND, "batch", "sequence", None), back_N, axis=1), "batch", None, None)

    def attend(q: Array, k: Array, v: Array, q_sel: Array | None, k_sel: Array | None) -> tuple[Array, Any]:
        out_BNHD, _ = attending(config, AttentionOptions())(q, k, v, q_sel, k_sel)
        q_sel = reshard(q, "batch", "sequence", None, None)[:, :, 0] if q_sel is None else q_sel
        k_sel = reshard(k, "batch", "sequence", None, None)[:, :, 0] if k_sel is None else k_sel
        scale, selection = config.head_dim**-0.5, config.selection
        return out_BNHD, reduce(selection_mask(whole(q_sel), whole(k_sel), scale=scale, selection=selection))

    return attend


def make_parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, stddev: float) -> nnx.Param:
    """Normal float32 parameter, made where it will live: under a mesh every device draws only its own shard."""
    spec = partition_spec(axes, shape)
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec) * stddev
    return nnx.Param(value, axes=axes)


def make_scale(shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=(None,) * len(shape))


def rotary_angles(
    position_N: ArrayLike, width: int, base: float, scaling: RotaryScaling | None = None
) -> tuple[Array, Array]:
    """Cosine and sine by which the halves of heads of this width are rotated, float32 [(B,) N, D / 2]."""
    half = width // 2
    frequency_D = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency_D = _slowed(frequency_D, scaling)
    angle = jnp.asarray(position_N, jnp.float32)[..., None] * frequency_D
    return jnp.cos(angle), jnp.sin(angle)


def _slowed(frequency_D: Array, scaling: RotaryScaling) -> Array:
    if scaling.kind == "linear":
        return frequency_D / scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns_D = scaling.original_length * frequency_D / (2 * jnp.pi)
    kept_D = jnp.clip((turns_D - low) / (high - low), 0, 1)
    return frequency_D * (kept_D + (1 - kept_D) / scaling.factor)


def rotary(x_BNHD: Array, position_N: ArrayLike, base: float, scaling: RotaryScaling | None = None) -> Array:
    """Rotary position embedding, halves rotated as (x1, x2); `position_N` int32 [N] or [B, N]."""
    cos, sin = (angle[..., None, :] for angle in rotary_angles(position_N, x_BNHD.shape[-1], base, scaling))
    x1, x2 = jnp.split(x_BNHD.astype(jnp.promote_types(x_BNHD.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BNHD.dtype)


def fused_norm_rotary(
    x_BNHD: Array,
    scale: Array,
    position_N: ArrayLike,
    base: float,
    heads: str | None,
    scaling: RotaryScaling | None = None,
) -> Array:
    """`rotary(rms_norm(x, scale), position_N, base, scaling)` as a TPU kernel, every device on its own part.

    Positions int32 [N], or [B, 1] of one token a row.
    """
    angles = rotary_angles(position_N, x_BNHD.shape[-1], base, scaling)
    kernel = norm_rotary if angles[0].ndim == 2 else norm_rotary_tokens
    spec = partition_spec(("batch", "sequence", heads, None), x_BNHD.shape)
    if spec is None:
        return kernel(x_BNHD, scale, *angles)
    names = ("sequence", None) if angles[0].ndim == 2 else ("batch", "sequence", None)
    along = partition_spec(names, angles[0].shape)
    specs = spec, jax.P(), along, along
    local = [jax.reshard(x, s) for x, s in zip((x_BNHD, scale, *angles), specs, strict=True)]
    return jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)(*local)


class Block(nnx.Module):
    """One pre-norm layer. Constructed with a leading axis of `num_layers`; called on one layer's slice."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, layers = config, config.num_layers
        into = c.d_model**-0.5
        # Outputs onto the residual stream are scaled down so that its variance does not grow with depth.
        attention_out = (c.num_heads * c.head_dim * 2 * layers) ** -0.5
        mlp_out = (c.mlp_dim * 2 * layers) ** -0.5
        self.config = config
        self.attention_norm = make_scale((layers, c.d_model))
        self.w_query = make_parameter(
            rngs, (layers, c.d_model, c.num_heads, c.head_dim), (None, "embed", "heads", None), into
        )
        kv_shape = (layers, c.d_model, c.num_kv_heads, c.head_dim)
        self.w_key = make_parameter(rngs, kv_shape, (None, "embed", "kv_heads", None), into)
        self.w_value = make_parameter(rngs, kv_shape, (None, "embed", "kv_heads", None), into)
        out_shape = (layers, c.num_heads, c.head_dim, c.d_model)
        self.w_out = make_parameter(rngs, out_shape, (None, "heads", None, "embed"), attention_out)
        if c.qk_norm:
            self.query_norm = make_scale((layers, c.head_dim))
            self.key_norm = make_scale((layers, c.head_dim))
        if c.selection is Selection.OWN_HEAD:
            self.w_query_sel = make_parameter(rngs, (layers, c.d_model, c.head_dim), (None, "embed", None), into)
            self.w_key_sel = make_parameter(rngs, (layers, c.d_model, c.head_dim), (None, "embed", None), into)
            if c.qk_norm:
                self.query_sel_norm = make_scale((layers, c.head_dim))
                self.key_sel_norm = make_scale((layers, c.head_dim))
        self.mlp_norm = make_scale((layers, c.d_model))
        self.w_gate = make_parameter(rngs, (layers, c.d_model, c.mlp_dim), (None, "embed", "mlp"), into)
        self.w_up = make_parameter(rngs, (layers, c.d_model, c.mlp_dim), (None, "embed", "mlp"), into)
        self.w_down = make_parameter(rngs, (layers, c.mlp_dim, c.d_model), (None, "mlp", "embed"), mlp_out)

    def __call__(self, x_BNE: Array, position_N: ArrayLike, attend: Attend) -> tuple[Array, Any]:
        """x [B, N, E], positions int32 [N] or [B, N], attention -> (x of the next layer, what `attend` adds)."""
        with jax.named_scope("attention"):
            x_BNE, extra = self.attention(x_BNE, position_N, attend)
        with jax.named_scope("mlp"):
            return self.mlp(x_BNE), extra

    def attention(self, x_BNE: Array, position_N: ArrayLike, attend: Attend) -> tuple[Array, Any]:
        """The first half of the layer: x + attention, and what `attend` adds."""
        q, k, v, q_sel, k_sel = self.project(self.norm(x_BNE, "attention_norm"), position_N)
        out_BNHD, extra = attend(q, k, v, q_sel, k_sel)
        # h and w, since einsum contracts letters in their order, and d before h would transpose the weights on CPUs.
        return keep(x_BNE + contract("bnhw,hwe->bne", out_BNHD, self.w_out, "batch", "sequence", None)), extra

    def norm(self, x: Array, scale: str) -> Array:
        """RMSNorm with one of this layer's scales."""
        return rms_norm(x, getattr(self, scale)[...], self.config.norm_epsilon)

    @property
    def logit_bound(self) -> Array | None:
        """float32 scalar, which no attention logit exceeds: normalised, q and k are at most D ** 0.5 times a scale."""
        if not self.config.qk_norm:
            return None
        largest = [jnp.max(jnp.abs(scale[...])) for scale in (self.query_norm, self.key_norm)]
        return self.config.head_dim**0.5 * jax.lax.stop_gradient(largest[0] * largest[1])

    def mlp(self, x_BNE: Array) -> Array:
        """The second half: x + SwiGLU."""
        c = self.config
        weights = self.w_gate, self.w_up, self.w_down
        return normalised_swiglu(x_BNE, self.mlp_norm[...], *weights, epsilon=c.norm_epsilon, fused=c.fuses_swiglu)

    def project(self, h_BNE: Array, position_N: ArrayLike) -> tuple[Array, Array, Array, Array | None, Array | None]:
        """Queries, keys, values, and the selecting head's q and k if it has its own: normalised and rotated."""
        c = self.config
        q_BNHD = keep(contract("bne,ehd->bnhd", h_BNE, self.w_query, "batch", "sequence", "heads", None))
        k_BNKD = keep(contract("bne,ekd->bnkd", h_BNE, self.w_key, "batch", "sequence", "kv_heads", None))
        v_BNKD = keep(contract("bne,ekd->bnkd", h_BNE, self.w_value, "batch", "sequence", "kv_heads", None))

        def place(x_BNHD: Array, scale: str, heads: str | None) -> Array:
            one_token = x_BNHD.shape[1] == 1 and LANES % c.head_dim == 0
            if c.fuses_norm_rotary and (np.ndim(position_N) == 1 or one_token):
                norm = getattr(self, scale)[...]
                return fused_norm_rotary(x_BNHD, norm, position_N, c.rotary_base, heads, c.rotary_scaling)
            if c.qk_norm:
                x_BNHD = self.norm(x_BNHD, scale)
            if c.positions != "rotary":
                return x_BNHD
            return rotary(x_BNHD, position_N, c.rotary_base, c.rotary_scaling)

        q_BNHD, k_BNKD = place(q_BNHD, "query_norm", "heads"), place(k_BNKD, "key_norm", "kv_heads")
        if c.selection is not Selection.OWN_HEAD:
            return q_BNHD, k_BNKD, v_BNKD, None, None
        q_sel_BND = keep(contract("bne,ed->bnd", h_BNE, self.w_query_sel, "batch", "sequence", None))
        k_sel_BND = keep(contract("bne,ed->bnd", h_BNE, self.w_key_sel, "batch", "sequence", None))
        q_sel_BND = place(q_sel_BND[:, :, None], "query_sel_norm", None)[:, :, 0]
        k_sel_BND = place(k_sel_BND[:, :, None], "key_sel_norm", None)[:, :, 0]
        return q_BNHD, k_BNKD, v_BNKD, q_sel_BND, k_sel_BND


class Transformer(nnx.Module):
    """Tokens to logits. `Transformer(config, rngs=nnx.Rngs(params=seed))`; under `jax.jit` and a mesh, sharded from
    the start.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.embedding = make_parameter(rngs, (c.vocab_size, c.d_model), ("vocab", "embed"), c.d_model**-0.5)
        if c.positions == "learned":
            shape = (c.max_length, c.d_model)
            self.position_embedding = make_parameter(rngs, shape, (None, "embed"), c.d_model**-0.5)
        self.blocks = Block(config, rngs)
        self.final_norm = make_scale((c.d_model,))
        if not c.tied_embeddings:
            self.output = make_parameter(rngs, (c.vocab_size, c.d_model), ("vocab", "embed"), c.d_model**-0.5)

    def __call__(self, tokens_BN: Array, *, segment_ids: Array | None = None, evict_at: Array | None = None) -> Array:
        """Logits [B, N, V] float32 of the next token, from int32 tokens [B, N]; N at most `max_length`.

        `segment_ids` int32 [B, N] and `evict_at` int32 [L, B, N] are as in `selective_attention`.
        """
        return self.logits(self.hidden(tokens_BN, segment_ids=segment_ids, evict_at=evict_at)[0])

    def hidden(
        self,
        tokens_BN: Array,
        *,
        segment_ids: Array | None = None,
        evict_at: Array | None = None,
        memory_tau: float | None = None,
    ) -> tuple[Array, Array | None]:
        """Final hidden states [B, N, E], and with `memory_tau` the memory statistic [L, B, N] of
        `selective_attention`.
        """
        c = self.config
        position_N = sequence_order(tokens_BN.shape[1])
        tokens_BN = permute(tokens_BN, position_N)
        segment_ids, evict_at = (None if x is None else permute(x, position_N) for x in (segment_ids, evict_at))

        def layer(block: Block, x_BNE: Array, layer_evict_at: Array | None):
            told = AttentionOptions(
                evict_at=layer_evict_at, segment_ids=segment_ids, memory_tau=memory_tau, logit_bound=block.logit_bound
            )
            with jax.named_scope("layer"):
                return block(x_BNE, position_N, attending(c, told))

        x_BNE = self.embed(tokens_BN, position_N)
        x_BNE, forgotten_LBN = each_layer(c, self.blocks, layer, x_BNE, evict_at)
        return self.finish(x_BNE, forgotten_LBN, position_N)

    def finish(self, x_BNE: Array, forgotten_LBN: Array | None, position_N: np.ndarray) -> tuple[Array, Array | None]:
        """The last layer's output, normalised, and the memory statistic, both in the order of the text again."""
        back_N = np.argsort(position_N)
        hidden_BNE = permute(self.normalised(x_BNE), back_N, axis=1)
        return hidden_BNE, None if forgotten_LBN is None else permute(forgotten_LBN, back_N)

    def normalised(self, x: Array) -> Array:
        """The last layer's output as `logits` takes it."""
        return rms_norm(x, self.final_norm[...], self.config.norm_epsilon)

    def embed(self, tokens_BN: Array, position_N: ArrayLike) -> Array:
        """[B, N, E]: embedded tokens, with learned positions added if the model has them."""
        x_BNE = lookup(self.embedding, tokens_BN, self.config.dtype)
        if self.config.positions == "learned":
            x_BNE = x_BNE + reshard(self.position_embedding[...], None, None)[jnp.asarray(position_N)]
        return x_BNE.astype(self.config.dtype)

    def logits(self, hidden_BNE: Array) -> Array:
        """float32 [B, N, V] from final hidden states, sharded over `tensor` along V."""
        weight = self.embedding if self.config.tied_embeddings else self.output
        gathered_VE = reshard(weight[...].astype(hidden_BNE.dtype), "vocab", None)
        spec = partition_spec(("batch", "sequence", "vocab"), (*hidden_BNE.shape[:2], gathered_VE.shape[0]))
        dtype = jnp.promote_types(hidden_BNE.dtype, jnp.float32)
        return jnp.einsum("bne,ve->bnv", hidden_BNE, gathered_VE, preferred_element_type=dtype, out_sharding=spec)

    def selection_masks(self, tokens_BN: Array, reduce: Callable[[Array], Any] = lambda f_BNM: f_BNM) -> Any:
        """`reduce(F)` of every layer, stacked along a leading L: by default F itself, [L, B, N, N] float32.

        For looking at the mask, not for training: one layer's whole F is in memory at a time.
        """
        position_N = sequence_order(tokens_BN.shape[1])
        attend = masking(self.config, position_N, reduce)
        graph, layers = nnx.split(self.blocks)

        def layer(x_BNE, layer_parameters):
            return nnx.merge(graph, layer_parameters)(x_BNE, position_N, attend)

        return jax.lax.scan(layer, self.embed(permute(tokens_BN, position_N), position_N), layers)[1]


def each_layer(
    config: TransformerConfig, stacked: Any, layer: Callable, x_BNE: Array, by_layer: Any = None
) -> tuple[Array, Any]:
    """`layer(module, x, its part of by_layer)`, one after the other: (the last x, what each adds, stacked along L).

    `stacked` are modules whose parameters, and `by_layer` arrays that, have a leading L; scanned or apart, and
    recomputed, as the config says.
    """
    graph, parameters = nnx.split(stacked)

    def one(x_BNE, own):
        return layer(nnx.merge(graph, own[0]), x_BNE, own[1])

    recomputed = rematerialised(one, config.remat, config.scan_layers)
    return jax.lax.scan(recomputed, x_BNE, (parameters, by_layer), unroll=1 if config.scan_layers else True)


def sequence_order(length: int) -> np.ndarray:
    """int32 [N]: the position that each place of a sequence holds on the mesh that is set (`zigzag_positions`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return zigzag_positions(length, 1 if mesh.empty else mesh.shape.get(CONTEXT, 1))


def permute(x: Array, order_N: np.ndarray, axis: int = -1) -> Array:
    """`x` with its sequence axis put in this order: tokens [B, N], [L, B, N] or, with axis 1, [B, N, E]."""
    if np.array_equal(order_N, np.arange(len(order_N))):
        return x
    leading = (None,) * (x.ndim - 2) if axis == -1 else ()
    trailing = (None,) * (x.ndim - 2) if axis == 1 else ()
    whole = reshard(x, *leading, "batch", None, *trailing)
    return reshard(jnp.take(whole, order_N, axis=axis), *leading, "batch", "sequence", *trailing)
