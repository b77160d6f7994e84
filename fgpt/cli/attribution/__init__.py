"""`fgpt attribute`: which training rows made a run answer as it does."""
