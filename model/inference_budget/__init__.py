"""Per-layer memory budgets for selective-attention transformers (arXiv 2410.02703, section 2)."""

from .budgets import Budgets
from .cache import PrunedLayerCache, cache_bytes, init_pruned_cache, memory_factor
from .generation import generate
from .perplexity import Evaluator, Losses, Windows, eviction_times
from .policies import H2O, POLICIES, TOVA, EvictionPolicy, Held, OldestFirst, Random, Selective, SinksAndWindow
from .prefill import prefill
from .search import Found, Point, baselines, search

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "Budgets",
    "Evaluator",
    "EvictionPolicy",
    "Found",
    "Held",
    "Losses",
    "OldestFirst",
    "Point",
    "PrunedLayerCache",
    "Random",
    "Selective",
    "SinksAndWindow",
    "Windows",
    "baselines",
    "cache_bytes",
    "eviction_times",
    "generate",
    "init_pruned_cache",
    "memory_factor",
    "prefill",
    "search",
]
