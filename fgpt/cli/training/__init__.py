"""The training loop and the three kinds of training."""
