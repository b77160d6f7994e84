"""Programs that transforms of a training make possible: gradients of each example, and what follows from them."""
