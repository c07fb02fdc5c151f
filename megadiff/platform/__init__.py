"""The machine: CPU or CUDA, and where megatron-core is made to run on CPU."""
