"""Documents that are left out by their text: too short, too long, or of the other split.

All depend on the text alone, so the same text is treated the same wherever it occurs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from megadiff.errors import DataError

SPLITS = ("train", "valid")
"""Splits of a corpus of which a fraction is held out; the first is the default."""

DIGEST_BYTES = 16
"""Size of a document's digest. Among 10**10 different texts two have the same digest with a chance of 10**-19."""


def digest(text: str) -> bytes:
    """Return the digest of a text: BLAKE2b of its UTF-8 bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class DocumentFilters:
    """Rules by which documents are left out.

    Raises:
        DataError: a number is out of its range.
    """

    min_characters: int = 0
    """Least number of characters."""

    max_characters: int | None = None
    """Largest number of characters; None for any."""

    valid_fraction: float = 0.0
    """Share of the documents that is held out for validation, from 0 to below 1."""

    split: str = SPLITS[0]
    """The split to keep: `train` or `valid`."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise DataError(f"--valid-fraction must be from 0 to below 1, found {self.valid_fraction:g}")
        if self.split == "valid" and not self.valid_fraction:
            raise DataError("--split valid: wanted --valid-fraction above 0 beside it, found none; give the fraction")
        least = max(1, self.min_characters)
        if self.min_characters < 0 or (self.max_characters is not None and self.max_characters < least):
            found = f"{self.min_characters} and {self.max_characters}"
            raise DataError(f"--min-characters must be at least 0 and at most --max-characters, found {found}")

    def reason_to_drop(self, text: str) -> str | None:
        """Return why a text is left out, as the name of a count of `CorpusReport`; None if it is kept."""
        if len(text) < self.min_characters:
            return "too_short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too_long"
        if self.valid_fraction:
            # The last eight bytes: the first ones sort duplicates into groups, which each split should fill evenly.
            is_held_out = int.from_bytes(digest(text)[8:], "little") < self.valid_fraction * 2**64
            if is_held_out != (self.split == "valid"):
                return "other_split"
        return None


NO_FILTERS = DocumentFilters()
"""Filters that keep every document."""
