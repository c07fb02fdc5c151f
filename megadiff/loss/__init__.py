"""The LM head fused with the objective, so that no [tokens, vocabulary] array is ever complete in memory.

`fused_lm_head` processes chunks of tokens, with passes over a chunk's logits in plain torch or Triton
(`triton_passes`), and `choose_loss_kernel` selects between them. `lm_head` has their inputs and the simple reference.
"""

from __future__ import annotations

CHUNK_LOGITS = {"fp32": 2**25, "bf16": 2**29}
"""Number of logits per chunk: 128 MiB, which suits a CPU's caches, and 1 GiB on a GPU, where smaller chunks would leave
it waiting for launches and for the traffic of dW, which every chunk reads and writes once. On a CPU, bf16 uses the
value of fp32.
"""
CHUNK_ROWS = 128
"""Chunk sizes are rounded to a multiple of this number of tokens, if there are enough, for GEMM efficiency."""
