"""Selective attention for JAX: the mechanism, a transformer that uses it, and its losses (arXiv 2410.02703)."""

from .attention import Selection, selection_mask, selective_attention
from .config import TransformerConfig
from .losses import lm_loss, memory_loss, memory_per_query, selection_statistics
from .parallel import sharded_selective_attention, zigzag_positions
from .sharding import RULES, partition_spec, reshard
from .transformer import Block, Transformer

__all__ = [
    "RULES",
    "Block",
    "Selection",
    "Transformer",
    "TransformerConfig",
    "lm_loss",
    "memory_loss",
    "memory_per_query",
    "partition_spec",
    "reshard",
    "selection_mask",
    "selection_statistics",
    "selective_attention",
    "sharded_selective_attention",
    "zigzag_positions",
]
