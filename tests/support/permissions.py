"""Rights of a process that runs as root."""

from __future__ import annotations

import ctypes


def heed_permissions() -> None:
    """Root, too, is held to what a folder allows: the process gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110
    assert libc.capset(header, data) == 0
