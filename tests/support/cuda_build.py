"""An imitation of torch's CUDA build on a machine without a driver, which is what a plain package index installs.

The two builds differ in their version, in what they report to be built in, and in the error raised where a device is
asked for. A whole run with the real CUDA build costs several gigabytes; with `MEGADIFF_IMITATE_CUDA_BUILD=1` the tests
meet those differences for nothing.
"""

from __future__ import annotations

import os
from typing import NoReturn

import torch

VARIABLE = "MEGADIFF_IMITATE_CUDA_BUILD"


def imitate_where_asked() -> None:
    """Give torch the CUDA build's version, facts and error, where the variable is set and the build is another."""
    if os.environ.get(VARIABLE) != "1" or torch.version.cuda is not None:
        return
    release = torch.__version__.partition("+")[0]
    torch.__version__ = type(torch.__version__)(f"{release}+cu130")
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = lambda: True
    torch.distributed.is_nccl_available = lambda: True
    torch.cuda._lazy_init = _no_driver


def _no_driver() -> NoReturn:
    raise RuntimeError(
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
        "http://www.nvidia.com/Download/index.aspx"
    )
