"""One small file a family: pure name maps between the hub's tensors and our tree."""
