"""Placeholder for `megadiff/sampling/standalone.py`, whose copy in an exported folder has this name."""

from megadiff.sampling.standalone import HybridNoise, Noise, Settings, generate

__all__ = ["HybridNoise", "Noise", "Settings", "generate"]
