"""Per-layer memory budgets for selective-attention transformers (arXiv 2410.02703, section 2)."""

from .budgets import Budgets, BudgetsError
from .cache import PrunedLayerCache, cache_bytes, init_pruned_cache, memory_factor
from .engine import Engine
from .generation import Decoder, generate
from .interchange import load_budgets, model_fingerprint, save_budgets
from .perplexity import Evaluator, Losses, Windows, eviction_times
from .policies import (
    H2O,
    POLICIES,
    TOVA,
    EvictionPolicy,
    Forgotten,
    Held,
    OldestFirst,
    Random,
    Selective,
    SinksAndWindow,
    find_policy,
    policy_for,
    policy_for_plan,
    policy_name,
)
from .prefill import prefill
from .requests import Completion, GenerationRequest, Progress, TokenLogprob
from .scoring import Request, Score, Scorer
from .search import Found, Point, baselines, best_point, exchange, search, uniform

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "Budgets",
    "BudgetsError",
    "Completion",
    "Decoder",
    "Engine",
    "Evaluator",
    "EvictionPolicy",
    "Forgotten",
    "Found",
    "GenerationRequest",
    "Held",
    "Losses",
    "OldestFirst",
    "Point",
    "Progress",
    "PrunedLayerCache",
    "Random",
    "Request",
    "Score",
    "Scorer",
    "Selective",
    "SinksAndWindow",
    "TokenLogprob",
    "Windows",
    "baselines",
    "best_point",
    "cache_bytes",
    "eviction_times",
    "exchange",
    "find_policy",
    "generate",
    "init_pruned_cache",
    "load_budgets",
    "memory_factor",
    "model_fingerprint",
    "policy_for",
    "policy_for_plan",
    "policy_name",
    "prefill",
    "save_budgets",
    "search",
    "uniform",
]
