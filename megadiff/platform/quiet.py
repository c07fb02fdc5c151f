"""megatron-core without its chorus of warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Import megatron-core, build its configuration and call its checkpoints inside this block.

    It warns once per optional library it does not find (Transformer Engine, Apex, and others) and of deprecations of
    its own; what was found is said in one line by `Platform.describe`.
    """
    # A CUDA build of torch on a machine without a GPU says so once per process when megatron-core imports this module.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def silence_libraries() -> None:
    """Drop the warnings megatron-core and torch.distributed raise in every step, for the rest of the process.

    They are addressed to those libraries' own developers (deprecated names of collectives, CUDA advice on CPU), a line
    per rank each; ours and everybody else's still show.
    """
    for module in (r"megatron\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
