"""Number of logits that a fused head computes at a time, by precision. Imports nothing."""

LOGITS = {"fp32": 2**25, "bf16": 2**29}
"""Number of logits per chunk: 128 MiB, which suits a CPU's caches, and 1 GiB on a GPU, where smaller chunks would leave
it waiting for launches and for the traffic of dW, which every chunk reads and writes once. On a CPU, bf16 uses the
value of fp32.
"""
ROWS = 128
"""Chunk sizes are rounded to a multiple of this number of tokens, if there are enough, for GEMM efficiency."""
