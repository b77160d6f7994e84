"""The command line: what `fgpt` runs."""
