"""Megatron's MMIDIDX file format, defined once for the reader and the writer.

    P.bin   the tokens of all sequences, one after another, in one integer type
    P.idx   magic[9] version:u64=1 dtype:u8 sequences:u64 documents+1:u64
            lengths:i32[S]  pointers:i64[S] (byte offsets into P.bin)  documents:i64[D + 1] (sequence numbers, 0 .. S)
            and, in multimodal files only, modes:i8[S]

Little-endian throughout. Source: megatron.core.datasets.indexed_dataset of megatron-core 0.16.1.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, sequences, documents + 1: 34 bytes."""

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Token types by code; codes 6 and 7 are floats, which hold no tokens."""

CODES: dict[np.dtype, int] = {dtype: code for code, dtype in DTYPES.items()}

_UINT16_BELOW = 65500  # Megatron's own threshold, a little under 2 ** 16


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of this vocabulary."""
    return DTYPES[8] if vocab_size < _UINT16_BELOW else DTYPES[4]


def bin_path(prefix: str | Path) -> Path:
    """Return the path `P.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path `P.idx`."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """Return the path `P.json`."""
    return Path(f"{prefix}.json")


def without_suffix(prefix: str | Path) -> str:
    """Return the prefix P, also if given as `P.bin` or `P.idx`."""
    return str(prefix).removesuffix(".bin").removesuffix(".idx")
