"""What changes with a model's size, measured over many sizes: slopes of coordinates, optima of learning rates."""
