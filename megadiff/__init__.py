"""Pretraining of discrete diffusion language models on Megatron-Core."""

from megadiff.platform import without_compiler

__version__ = "0.1.0"

without_compiler.install()
