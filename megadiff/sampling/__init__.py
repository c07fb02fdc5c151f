"""Noise to text through any function from token ids to logits."""
