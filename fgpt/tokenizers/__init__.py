"""Tokenizers: what turns text into ids, with its chat template and special tokens."""
