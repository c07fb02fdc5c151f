"""Detection of the machine (CPU or CUDA), and the changes that make megatron-core run on CPU."""
