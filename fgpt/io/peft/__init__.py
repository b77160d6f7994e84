"""PEFT's adapter folders, read and written."""
