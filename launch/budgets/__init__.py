"""The commands around inference_budget: search, evaluate, generate and report."""
