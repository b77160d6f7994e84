"""Metrics of answers that need no judge."""
