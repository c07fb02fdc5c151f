"""The order in which a GPU starts kernels of several streams, set before CUDA starts."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def order_launches(*, tensor_ranks: int, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Let kernels start in the order they were launched in, where tensor-parallel overlap counts on it.

    megatron-core launches a communication before the matrix product that hides it; with several hardware queues the
    product may start first and take the whole chip (tensor_parallel/layers.py says "we rely on
    CUDA_DEVICE_MAX_CONNECTIONS=1"). Results are the same, only slower. The driver reads the variable when the process
    first uses the device, so this comes before `machine.detect`. A value that is set stays.

    Returns:
        A line for the log, or None where nothing is to be said: one tensor rank, or set to 1 already.
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
