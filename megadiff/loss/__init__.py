"""The LM head fused with the objective, so that no [tokens, vocabulary] array is ever complete in memory.

`fused_lm_head` processes chunks of tokens; the passes over a chunk's logits are in plain torch (`chunk_passes`) or
Triton (`triton_passes`), and `choice` selects between them. `plain_lm_head` is the simple reference.
"""
