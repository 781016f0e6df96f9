"""The command that evaluates a checkpoint, with a full cache and under budgets: perplexity, tasks, retrieval."""
