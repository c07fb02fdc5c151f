"""The denoiser: a bidirectional Megatron-Core Transformer that returns logits and knows no noise."""
