"""The one definition of invalid token ids, used when data are written, read and scanned."""

from __future__ import annotations

import numpy as np


def wrong_ids(ids: np.ndarray, *, vocab_size: int | None, mask_id: int | None) -> np.ndarray:
    """Return the places in `ids` ([n], as stored) that are negative, at or above V, or the mask: [m] int64."""
    if not ids.size:
        return np.empty(0, dtype=np.int64)
    low, high = int(ids.min()), int(ids.max())
    is_mask = ids == mask_id if mask_id is not None and low <= mask_id <= high else None
    if low >= 0 and (vocab_size is None or high < vocab_size) and (is_mask is None or not is_mask.any()):
        return np.empty(0, dtype=np.int64)
    wrong = ids < 0
    if vocab_size is not None and high >= vocab_size:
        wrong |= ids >= vocab_size
    if is_mask is not None:
        wrong |= is_mask
    return np.flatnonzero(wrong)
