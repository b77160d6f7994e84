"""Evaluation: log-likelihoods, perplexity, and the difference between two models' outputs."""
