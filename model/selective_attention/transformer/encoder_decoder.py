"""An encoder-decoder in the manner of T5 whose decoder's self-attention is selective.

Encoder and decoder are made of the same `Block` as the `Transformer`. The encoder attends in both directions and the
decoder's cross-attention to the whole input, both without selection: it is defined for causal attention alone.

Shape letters: the package's; M input positions, which are the keys of cross-attention, N output positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ..attention import AttentionOptions
from ..selection import HIDDEN, Selection
from ..sharding import reshard
from .config import TransformerConfig
from .decoding import Cache, init_cache, layers_of, unstacked
from .projection import contract, rms_norm
from .sampling import check_sampling, draw
from .transformer import (
    Attend,
    Block,
    Transformer,
    attending,
    each_layer,
    make_parameter,
    make_scale,
    masking,
    permute,
    sequence_order,
)


def full_attention(q: Array, k: Array, v: Array, visible_BM: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v over all visible keys: q [B, N, H, D]; k, v [B, M, K, D]; visible bool [B, M]."""
    batch, length, num_heads, head_dim = q.shape
    k, v = (reshard(x, "batch", None, "kv_heads", None) for x in (k, v))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_BNKGD = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], head_dim)
    logits_BKGNM = jnp.einsum("bnkgd,bmkd->bkgnm", q_BNKGD, k, preferred_element_type=dtype) * head_dim**-0.5
    visible = reshard(visible_BM, "batch", None)[:, None, None, None, :]
    weights_BKGNM = jax.nn.softmax(jnp.where(visible, logits_BKGNM, -HIDDEN), axis=-1) * visible
    out_BNKGD = jnp.einsum("bkgnm,bmkd->bnkgd", weights_BKGNM.astype(v.dtype), v, preferred_element_type=dtype)
    return out_BNKGD.reshape(q.shape).astype(q.dtype)


class CrossAttention(nnx.Module):
    """Attention from the decoder to the encoder's output; stacked and called like `Block`."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, layers = config, config.num_layers
        into, out = c.d_model**-0.5, (c.num_heads * c.head_dim * 2 * layers) ** -0.5
        kv_shape = (layers, c.d_model, c.num_kv_heads, c.head_dim)
        heads, kv_heads = (None, "embed", "heads", None), (None, "embed", "kv_heads", None)
        self.config = config
        self.norm = make_scale((layers, c.d_model))
        self.w_query = make_parameter(rngs, (layers, c.d_model, c.num_heads, c.head_dim), heads, into)
        self.w_key = make_parameter(rngs, kv_shape, kv_heads, into)
        self.w_value = make_parameter(rngs, kv_shape, kv_heads, into)
        out_shape = (layers, c.num_heads, c.head_dim, c.d_model)
        self.w_out = make_parameter(rngs, out_shape, (None, "heads", None, "embed"), out)
        if c.qk_norm:
            self.query_norm = make_scale((layers, c.head_dim))
            self.key_norm = make_scale((layers, c.head_dim))

    def keys_values(self, encoded_BME: Array) -> tuple[Array, Array]:
        """What every output attends to, [B, M, K, D]."""
        k = contract("bme,ekd->bmkd", encoded_BME, self.w_key, "batch", "sequence", "kv_heads", None)
        v = contract("bme,ekd->bmkd", encoded_BME, self.w_value, "batch", "sequence", "kv_heads", None)
        return rms_norm(k, self.key_norm[...], self.config.norm_epsilon) if self.config.qk_norm else k, v

    def __call__(self, x_BNE: Array, k: Array, v: Array, visible_BM: Array) -> Array:
        """x + attention to keys and values of `keys_values` where `visible_BM`."""
        epsilon = self.config.norm_epsilon
        normed_BNE = rms_norm(x_BNE, self.norm[...], epsilon)
        q = contract("bne,ehd->bnhd", normed_BNE, self.w_query, "batch", "sequence", "heads", None)
        if self.config.qk_norm:
            q = rms_norm(q, self.query_norm[...], epsilon)
        out_BNHD = full_attention(q, k, v, visible_BM)
        return x_BNE + contract("bnhd,hde->bne", out_BNHD, self.w_out, "batch", "sequence", None)


class EncoderDecoder(nnx.Module):
    """Input tokens and output tokens so far to logits of the next output token. Meshes as for `Transformer`."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """`config` is of the decoder; the encoder has the same sizes, and both share the embedding."""
        self.config = config
        self.decoder = Transformer(config, rngs=rngs)
        self.cross_attention = CrossAttention(config, rngs)
        self.encoder_blocks = Block(dataclasses.replace(config, selection=Selection.OFF), rngs)
        self.encoder_norm = make_scale((config.d_model,))

    def __call__(self, inputs_BM: Array, outputs_BN: Array, *, visible_BM: Array | None = None) -> Array:
        """Logits [B, N, V] float32.

        Args:
          inputs_BM: int32 tokens of the encoder; M at most `max_length`.
          outputs_BN: int32 tokens of the decoder, beginning with BOS, which selection protects.
          visible_BM: bool, False for padding of the input; by default all are seen.
        """
        return self.decoder.logits(self.hidden(inputs_BM, outputs_BN, visible_BM=visible_BM)[0])

    def encode(self, inputs_BM: Array, visible_BM: Array) -> Array:
        """The encoder's normalised output, [B, M, E]."""
        position_M = np.arange(inputs_BM.shape[1])

        def attend(q, k, v, q_sel, k_sel):
            return full_attention(q, k, v, visible_BM), None

        def layer(block, x_BME, _):
            return block(x_BME, position_M, attend)

        x_BME = each_layer(self.config, self.encoder_blocks, layer, self.decoder.embed(inputs_BM, position_M))[0]
        return rms_norm(x_BME, self.encoder_norm[...], self.config.norm_epsilon)

    def hidden(
        self,
        inputs_BM: Array,
        outputs_BN: Array,
        *,
        visible_BM: Array | None = None,
        memory_tau: float | None = None,
    ) -> tuple[Array, Array | None]:
        """The decoder's final states [B, N, E], and with `memory_tau` its memory statistic [L, B, N]."""
        position_N = sequence_order(outputs_BN.shape[1])
        attend = attending(self.config, AttentionOptions(memory_tau=memory_tau))
        x_BNE, forgotten_LBN = self._decode(inputs_BM, outputs_BN, visible_BM, position_N, attend)
        return self.decoder.finish(x_BNE, forgotten_LBN, position_N)

    def logits(self, hidden_BNE: Array) -> Array:
        """float32 [B, N, V] from the decoder's final states."""
        return self.decoder.logits(hidden_BNE)

    def selection_masks(
        self,
        inputs_BM: Array,
        outputs_BN: Array,
        *,
        visible_BM: Array | None = None,
        reduce: Callable[[Array], Any] = lambda f_BNM: f_BNM,
    ) -> Any:
        """As `Transformer.selection_masks`, of the decoder's layers."""
        position_N = sequence_order(outputs_BN.shape[1])
        return self._decode(inputs_BM, outputs_BN, visible_BM, position_N, masking(self.config, position_N, reduce))[1]

    def _decode(
        self, inputs_BM: Array, outputs_BN: Array, visible_BM: Array | None, position_N: np.ndarray, attend: Attend
    ) -> tuple[Array, Any]:
        """The last layer's output in the order of `position_N`, and what `attend` adds in each layer."""
        visible = jnp.ones_like(inputs_BM, bool) if visible_BM is None else visible_BM
        encoded_BME = self.encode(inputs_BM, visible)

        def layer(modules, x_BNE, _):
            block, cross_attention = modules
            x_BNE, extra = block.attention(x_BNE, position_N, attend)
            return block.mlp(cross_attention(x_BNE, *cross_attention.keys_values(encoded_BME), visible)), extra

        x_BNE = self.decoder.embed(permute(outputs_BN, position_N), position_N)
        return each_layer(self.config, (self.decoder.blocks, self.cross_attention), layer, x_BNE)

    @staticmethod
    def parameter_counts(config: TransformerConfig) -> dict[str, int]:
        """As `TransformerConfig.parameter_counts`."""
        decoder = config.parameter_counts()
        encoder = dataclasses.replace(config, selection=Selection.OFF).parameter_counts()
        norms = encoder["norms"] + config.num_layers * (config.d_model + 2 * config.head_dim * config.qk_norm)
        added = {"attention": 2 * encoder["attention"], "mlp": encoder["mlp"], "norms": norms}
        counts = {part: count + added.get(part, 0) for part, count in decoder.items() if part != "total"}
        return counts | {"total": sum(counts.values())}


class Filler:
    """An encoder-decoder that has read its input, and writes one token after the other. No mesh."""

    def __init__(self, model: EncoderDecoder, inputs_BM: Array, visible_BM: Array):
        """Runs the encoder, and keeps what cross-attention reads of it; arguments as `EncoderDecoder` takes them."""
        self._decoder, num_layers = model.decoder, model.config.num_layers
        encoded_BME = model.encode(inputs_BM, visible_BM)
        self._visible_BM = visible_BM
        crosses = unstacked(model.cross_attention, num_layers)
        self._layers = [
            (block, cross, *cross.keys_values(encoded_BME))
            for block, cross in zip(layers_of(model.decoder), crosses, strict=True)
        ]

    def step(self, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
        """As `decode_step`: takes in one token a row, the first of which must be <BOS>."""
        position_B1 = cache.position[:, None]
        x_B1E, after = self._decoder.embed(tokens_B[:, None], position_B1), []
        for (block, cross, k, v), layer in zip(self._layers, cache.layers, strict=True):
            x_B1E, held = block.attention(x_B1E, position_B1, functools.partial(layer.attend, cache.position))
            x_B1E = block.mlp(cross(x_B1E, k, v, self._visible_BM))
            after.append(held)
        logits_B1V = self._decoder.logits(self._decoder.normalised(x_B1E))
        return logits_B1V[:, 0], Cache(cache.position + 1, tuple(after))


def fill(
    model: EncoderDecoder,
    inputs_BM: Array,
    num_tokens: int,
    *,
    bos_id: int,
    key: Array,
    visible_BM: Array | None = None,
    temperature: float = 0.0,
) -> Array:
    """What the decoder writes for an input: int32 [B, num_tokens], drawn token by token behind <BOS>.

    Args:
      model: the encoder-decoder. No mesh.
      inputs_BM, visible_BM: as `EncoderDecoder` takes them.
      num_tokens: at most `max_length`.
      bos_id: the id of <BOS>.
      key: of `jax.random`.
      temperature: divides the logits; 0 takes the likeliest token.

    Raises:
      SamplingError: a length or temperature out of range.
    """
    check_sampling(model.config, 0, num_tokens, temperature, None)
    visible = jnp.ones_like(inputs_BM, bool) if visible_BM is None else visible_BM
    graph, parameters = nnx.split(model)
    return _fill(graph, parameters, inputs_BM, visible, key, temperature, bos_id, num_tokens=num_tokens)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_tokens")
def _fill(graph, parameters, inputs_BM, visible_BM, key, temperature, bos_id, *, num_tokens: int) -> Array:
    model = nnx.merge(graph, parameters)
    filler = Filler(model, inputs_BM, visible_BM)

    def step(carry, key):
        cache, tokens_B = carry
        logits_BV, cache = filler.step(cache, tokens_B)
        tokens_B = draw(logits_BV, key, temperature)
        return (cache, tokens_B), tokens_B

    batch = inputs_BM.shape[0]
    start = init_cache(model.config, batch, num_tokens), jnp.full(batch, bos_id, jnp.int32)
    return jax.lax.scan(step, start, jax.random.split(key, num_tokens))[1].T
