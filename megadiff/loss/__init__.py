"""The LM head fused with the objective, so that no [tokens, vocabulary] array is ever complete in memory.

`fused_lm_head` processes chunks of tokens, with passes over a chunk's logits in plain torch or Triton
(`triton_passes`), and `choice` selects between them. `plain_lm_head` is the simple reference.
"""
