"""Held-out loss, perplexity, lm-eval's tasks, comparisons."""
