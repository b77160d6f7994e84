"""Benchmarks, and how the embedded model was made. Not part of the installed package."""
