"""How many logits a fused head makes at a time, by the precision it computes in. Imports nothing."""

LOGITS = {"fp32": 2**25, "bf16": 2**29}
"""128 MiB, which suits a CPU's caches, and 1 GiB on a GPU, where fewer would leave it waiting for launches and for the
traffic of dW, which every chunk reads and writes once. On a CPU bf16 is taken as fp32 is."""
ROWS = 128
"""Chunks are made of whole multiples of so many tokens where there are enough: what matrix products like."""
