"""Silencing of megatron-core's import-time warnings and of its per-step warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings while megatron-core is imported, configured, or called for checkpoints.

    It warns once for each optional library that is missing (Transformer Engine, Apex and others) and about its own
    deprecations; `Platform.describe` shows in one line which libraries were found.
    """
    # A CUDA build of torch without a GPU warns once per process when megatron-core imports this module.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def silence_libraries() -> None:
    """Drop the warnings that megatron-core and torch.distributed raise in every step, for the rest of the process.

    They are meant for the developers of those libraries (deprecated names of collectives, CUDA advice on CPU, better
    ways to build a layer) and cost a line per rank each. Warnings of this package and of all others are still shown,
    and so are those that megatron-core logs about checkpoints.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.WARNING)
    for module in (r"megatron\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
