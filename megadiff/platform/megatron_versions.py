"""The versions of megatron-core that this package works with, and what differs between them.

Supported are 0.16 (Python 3.10 and newer) and 0.17 to 0.19 (Python 3.12 and newer by their own metadata). The layout,
resume and checkpoint tests run on 0.16.1 and, by `make test-versions`, on 0.19.2, which is unpacked beside the
environment; by `make test-python-3.12` a part of them runs where 0.19 was installed by pip. These places treat them
differently, or replace parts of the library by name:

=============================================  =====================================================================
place                                          difference
=============================================  =====================================================================
`gradients_in_norm` below                      0.19 renamed `get_main_grads_for_grad_norm`
`model/denoiser.py`, `qk_layernorm`            0.19 refuses norms of queries and keys in the layer's specification
                                               unless this is set while it builds; both versions then add up the
                                               gradients of these norms over tensor ranks, which is wrong for a gain
                                               that is cut (`build_chunks` sets it back)
`model/layers.py`                              0.19 has None where 0.16 has an identity for an absent norm
`optim/optimizer.py`, `_identity`              0.19 identifies parameter groups by keys that groups may lack
`platform/without_compiler.py`                 0.19 loads torch's compiler while it is imported
`platform/quiet.py`                            0.19 logs advice to its developers once a rank and build
`optim/optimizer.py`                           replaces parts of the distributed optimizer by name
`checkpoint/`                                  replaces parts of `dist_checkpointing` by name
`platform/megatron_on_cpu.py`                  replaces functions by name, and fails loudly where one is missing
=============================================  =====================================================================

For a new version: raise `SUPPORTED`, run the tests of `tests/distributed`, `tests/checkpoint`, `tests/optim` and
`tests/platform` on it, and compare the sites that these files name by line.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from megadiff.errors import PlatformError

SUPPORTED = ((0, 16), (0, 20))
"""Half-open range of versions (major, minor)."""
REQUIREMENT = "megatron-core>=0.16,<0.20"
"""The same range as a requirement of pip."""


def major_minor(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version, such as (2, 12) of `2.12rc1`; (0, 0) if it does not begin with two."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def check() -> None:
    """Check that megatron-core is installed in a supported version.

    Raises:
        PlatformError: it is missing, or of another version.
    """
    try:
        megatron = importlib.import_module("megatron.core")
    except ImportError as error:
        raise PlatformError(f"megatron-core is not importable ({error}); install `{REQUIREMENT}`") from error
    if not SUPPORTED[0] <= major_minor(megatron.__version__) < SUPPORTED[1]:
        raise PlatformError(
            f"megatron-core {megatron.__version__} is installed, but this package was checked against 0.16 to 0.19 "
            f"only; install `{REQUIREMENT}`, or re-check every place listed in megadiff/platform/megatron_versions.py"
        )


def gradients_in_norm(optimizer: Any) -> list[Any]:
    """Return the gradients that this rank counts in the global norm, from one of megatron-core's optimizers."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
