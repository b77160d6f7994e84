"""Benchmarks against the libraries people use today, in one process, turn and turn about."""
