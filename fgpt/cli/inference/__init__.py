"""Trained runs put to use."""
