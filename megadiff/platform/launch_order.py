"""Order in which a GPU starts kernels of several streams, fixed before CUDA starts."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def order_launches(*, tensor_ranks: int, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Make kernels start in the order in which they were launched, if tensor-parallel overlap relies on that.

    megatron-core launches a communication before the matrix product that hides it; with several hardware queues the
    product may start first and occupy the whole chip (tensor_parallel/layers.py: "we rely on
    CUDA_DEVICE_MAX_CONNECTIONS=1"). The results would be the same, only slower. The driver reads the variable when the
    process first uses the device, so call this before `machine.detect`. A value that is already set is kept.

    Returns:
        A line for the log; None if there is nothing to report, with a single tensor rank or if it was 1 already.
    """
    environ = os.environ if environ is None else environ
    if tensor_ranks == 1:
        return None
    value = environ.get(VARIABLE)
    if value is None:
        environ[VARIABLE] = "1"
        return f"{VARIABLE} was not set and is 1 now: tensor-parallel communication overlaps with computation"
    if value != "1":
        return (
            f"{VARIABLE} is {value}: tensor-parallel communication may wait for the computation it should hide behind; "
            "unset it or set it to 1"
        )
    return None
