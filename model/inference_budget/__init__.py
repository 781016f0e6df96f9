"""Per-layer memory budgets for selective-attention transformers (arXiv 2410.02703, section 2)."""
