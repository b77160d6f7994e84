"""Tokenizers: from text to tokens and back, with chat templates and special tokens."""
