"""Stands in for `megadiff/sampling/standalone.py`, of which an exported folder holds a copy under this name."""

from megadiff.sampling.standalone import HybridNoise, Noise, Settings, generate

__all__ = ["HybridNoise", "Noise", "Settings", "generate"]
