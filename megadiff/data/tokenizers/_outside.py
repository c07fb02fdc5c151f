"""A tokenizer of the user's own: a module named by its dotted path, with `build(argument)`.

What it returns needs `vocab_size`, `mask_id`, `fingerprint`, `encode(text)` and `decode(ids)`. It may leave out:
`bos_id`, `eos_id` and `pad_id` (there is none), `unknown_id` (id of unknown text, where that is a special id as well),
`name` (the dotted path), `special_names` (none), `encode_batch` and `encode_pieces` (`encode` is called), and `export`
(the tokenizer then cannot be exported). The ids of every text are checked, since one that is special or out of range
would spoil training without a sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megadiff.errors import DataError

_NEEDED = ("vocab_size", "mask_id", "fingerprint", "encode", "decode")


class WrongIdsError(DataError):
    """The tokenizer gives a text ids that no text may have."""


class OutsideTokenizer:
    """A tokenizer of the user's own as a `megadiff.data.tokenizers.Tokenizer`.

    Raises:
        DataError: it lacks what it needs, or its special ids are none of its ids.
    """

    def __init__(self, inner: Any, path: str) -> None:
        missing = [name for name in _NEEDED if not hasattr(inner, name)]
        if missing:
            listed = ", ".join(f"`{name}`" for name in missing)
            raise DataError(f"{path}: a tokenizer needs {listed}; add what is missing to what `build` returns")
        self._inner = inner
        self.name = str(getattr(inner, "name", path))
        self.fingerprint = str(inner.fingerprint)
        self.vocab_size = int(inner.vocab_size)
        self.mask_id = int(inner.mask_id)
        self.bos_id, self.eos_id, self.pad_id = (_optional(inner, kind) for kind in ("bos_id", "eos_id", "pad_id"))
        self.special_names: Sequence[str] = tuple(getattr(inner, "special_names", ()))
        self._specials = {i for i in (self.mask_id, self.bos_id, self.eos_id, self.pad_id) if i is not None}
        self._forbidden = self._specials - {getattr(inner, "unknown_id", None)}
        if wrong := sorted(i for i in self._specials if not 0 <= i < self.vocab_size):
            raise DataError(f"{path}: the special id {wrong[0]} is not below vocab_size {self.vocab_size}; correct it")

    @property
    def export_limits(self) -> str | None:
        """Reason why it cannot be exported; None where it exports itself."""
        limits = getattr(self._inner, "export_limits", None)
        return limits if hasattr(self._inner, "export") else "it has no `export`, so its model cannot be exported"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            WrongIdsError: an id is special, or none of the vocabulary's.
        """
        return self._checked(self._inner.encode(text), text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text."""
        if not hasattr(self._inner, "encode_batch"):
            return [self.encode(text) for text in texts]
        return [self._checked(ids, text) for ids, text in zip(self._inner.encode_batch(texts), texts, strict=True)]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text in pieces, or in one where the tokenizer knows no pieces."""
        if not hasattr(self._inner, "encode_pieces"):
            yield self.encode(text)
            return
        for piece in self._inner.encode_pieces(text):
            yield self._checked(piece, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids, without special ones."""
        return self._inner.decode([int(i) for i in ids if int(i) not in self._specials])

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Write the files of the tokenizer, by its own `export`.

        Raises:
            DataError: it has no `export`.
        """
        if not hasattr(self._inner, "export"):
            raise DataError(
                f"the tokenizer {self.name} cannot be exported, for it has no method "
                "`export(folder, *, seq_length, prepend_bos)`; add one, such as a call of "
                "megadiff.data.transformers_tokenizer.write_transformers_tokenizer"
            )
        return list(self._inner.export(folder, seq_length=seq_length, prepend_bos=prepend_bos))

    def _checked(self, ids: Sequence[int], text: str) -> list[int]:
        found = [int(i) for i in ids]
        if not self._forbidden.isdisjoint(found):
            token = next(i for i in found if i in self._forbidden)
            raise WrongIdsError(
                f"the tokenizer {self.name} turns the text {text[:40]!r} into the special id {token}; a model cannot "
                "tell it from a real one"
            )
        if found and not (min(found) >= 0 and max(found) < self.vocab_size):
            token = next(i for i in found if not 0 <= i < self.vocab_size)
            raise WrongIdsError(
                f"the tokenizer {self.name} turns the text {text[:40]!r} into the id {token}, which is not below its "
                f"vocab_size {self.vocab_size}"
            )
        return found


def _optional(inner: Any, kind: str) -> int | None:
    found = getattr(inner, kind, None)
    return None if found is None else int(found)
