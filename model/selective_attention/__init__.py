"""Selective attention for JAX: the mechanism, a transformer that uses it, and its losses (arXiv 2410.02703).

Shape letters of the package: B batch, N positions (of queries), M keys, H query heads, K key/value heads, G = H / K
query heads of each, D head width, E d_model, U SwiGLU width, V vocabulary, L layers, P devices along `context`. F and S
are the paper's mask and selection. The TPU kernels, which know no layers, have their own legend, in `columns.py`.
"""

from .attention import Selection, selection_mask, selective_attention
from .parallel import sharded_selective_attention, zigzag_positions
from .selection import forgotten_above
from .sharding import RULES, partition_spec, reshard
from .transformer.config import RotaryScaling, TransformerConfig
from .transformer.decoding import Cache, LayerCache, decode_step, init_cache, prefill
from .transformer.encoder_decoder import EncoderDecoder, fill
from .transformer.interchange import export_safetensors, import_safetensors
from .transformer.losses import lm_loss, memory_loss, memory_per_query, selection_statistics
from .transformer.sampling import SamplingError, sample
from .transformer.transformer import Block, Transformer

__all__ = [
    "RULES",
    "Block",
    "Cache",
    "EncoderDecoder",
    "LayerCache",
    "RotaryScaling",
    "SamplingError",
    "Selection",
    "Transformer",
    "TransformerConfig",
    "decode_step",
    "export_safetensors",
    "fill",
    "forgotten_above",
    "import_safetensors",
    "init_cache",
    "lm_loss",
    "memory_loss",
    "memory_per_query",
    "partition_spec",
    "prefill",
    "reshard",
    "sample",
    "selection_mask",
    "selection_statistics",
    "selective_attention",
    "sharded_selective_attention",
    "zigzag_positions",
]
