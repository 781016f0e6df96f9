"""Selective attention for JAX: the mechanism, a transformer that uses it, and its losses (arXiv 2410.02703).

Shape letters of the whole package, as suffixes of names and in shapes:

    B  rows of a batch: sequences                   E  d_model, width of the residual stream
    N  queries, or positions of a sequence          F  hidden width of SwiGLU
    M  keys, slots of a cache, encoder positions    V  vocabulary
    H  query heads                                  L  layers
    K  key/value heads, K dividing H                P  devices along the mesh axis `context`
    G  query heads of a key/value head, H / K       Q  queries of one such device, N / P
    D  head width; D' of the selecting head         R, C, I, J  tiles: `implementations/blockwise.py`

S and F of section 3 are arrays, and written s and f in names (`f_BNM`). The TPU kernels add letters for their layouts.
"""

from .attention import Selection, selection_mask, selective_attention
from .parallel import sharded_selective_attention, zigzag_positions
from .sharding import RULES, partition_spec, reshard
from .transformer.config import TransformerConfig
from .transformer.decoding import Cache, LayerCache, decode_step, init_cache, prefill
from .transformer.encoder_decoder import EncoderDecoder
from .transformer.interchange import export_safetensors, import_safetensors
from .transformer.losses import lm_loss, memory_loss, memory_per_query, selection_statistics
from .transformer.sampling import sample
from .transformer.transformer import Block, Transformer

__all__ = [
    "RULES",
    "Block",
    "Cache",
    "EncoderDecoder",
    "LayerCache",
    "Selection",
    "Transformer",
    "TransformerConfig",
    "decode_step",
    "export_safetensors",
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
