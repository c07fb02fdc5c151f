"""Pretraining of discrete diffusion language models on Megatron-Core."""

from megadiff.platform import megatron_imports

__version__ = "0.1.0"

megatron_imports.install()
