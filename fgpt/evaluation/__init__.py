"""Evaluation: log-likelihoods, perplexity, calibration, and the difference between two models' outputs."""
