"""Placeholder for `megadiff/model/rope.py`, whose copy in an exported folder has this name."""

from megadiff.model.rope import attention_factor_of, scaled_frequencies

__all__ = ["attention_factor_of", "scaled_frequencies"]
