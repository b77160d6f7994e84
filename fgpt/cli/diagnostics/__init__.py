"""Checks of a run: `doctor` and `replay`."""
