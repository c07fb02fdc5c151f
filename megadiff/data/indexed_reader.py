"""Read indexed tokens, ours or Megatron's, after checking every field and bound of the index.

Tokens are read with `pread` into fresh arrays: no array is a view of a mapped file, a file that shrinks while it is
read gives an error instead of a signal, and other threads run meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path

import numpy as np

from megadiff.data.indexed_format import (
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    bin_path,
    idx_path,
    manifest_path,
    without_suffix,
)
from megadiff.data.indexed_manifest import IndexedManifest, read_manifest
from megadiff.errors import DataError

_CHUNK = 2**20
_SAMPLED_SPANS = 64
_SAMPLED_TOKENS = 2**14
_REMEDY = "copy or preprocess the data again"


class IndexedReader:
    """The documents, and the flat token stream, of one prefix.

    Args:
        prefix: P, `P.bin` or `P.idx`.

    Raises:
        DataError: a file is missing, cut or damaged, or the manifest is of other data.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = without_suffix(prefix)
        self._bin, self._idx = bin_path(self.prefix), idx_path(self.prefix)
        self._refuse_missing()
        self.dtype, self.num_sequences, self.num_documents = self._checked_header()
        self._map_index()
        self.num_tokens = self._checked_index()
        self._check_bin_size()
        self.manifest = self._checked_manifest()
        self._descriptor = _open_for_reading(self._bin)
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer that made the ids; None without a manifest."""
        return self.manifest.tokenizer.fingerprint if self.manifest else None

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, for bits per byte; None without a manifest."""
        return self.manifest.source_bytes / self.manifest.tokens if self.manifest else None

    def tokens(self, offset: int, count: int) -> np.ndarray:
        """`count` tokens of the stream from `offset` on, over document ends: [count] int64, the caller's own."""
        if offset < 0 or count < 0 or offset + count > self.num_tokens:
            raise IndexError(f"tokens {offset} to {offset + count} are outside 0 to {self.num_tokens} of {self.prefix}")
        return self._stored(offset, count).astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        """All tokens of a document: [n] int64, the caller's own."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is outside 0 to {self.num_documents - 1} of {self.prefix}")
        start = self._token_offset(int(self._documents[index]))
        return self.tokens(start, self._token_offset(int(self._documents[index + 1])) - start)

    def check_vocabulary(self, vocab_size: int, *, mask_id: int | None = None, full: bool = False) -> None:
        """Look for ids that a model of this vocabulary cannot take, in 64 spans over the file or in all of it.

        Args:
            vocab_size: V; ids must lie in 0 .. V - 1.
            mask_id: an id that clean text must not hold.

        Raises:
            DataError: one is found; names the document and the place in it.
        """
        for offset, count in self._all_spans() if full else self._sampled_spans():
            ids = self.tokens(offset, count)
            wrong = (ids < 0) | (ids >= vocab_size) | (ids == (-1 if mask_id is None else mask_id))
            if not wrong.any():
                continue
            place = int(wrong.argmax())
            document, within = self._locate(offset + place)
            what = "the mask id" if ids[place] == mask_id else f"wanted 0 to {vocab_size - 1}"
            raise DataError(
                f"{self._bin}: document {document} has the token id {ids[place]} at position {within} ({what}); "
                "preprocess the corpus with the tokenizer of this run"
            )

    def content_fingerprint(self) -> str:
        """SHA-256 (hex) over sizes, type, tokenizer and 64 spans of tokens: tells changed data from moved ones."""
        facts = (self.dtype.name, self.num_sequences, self.num_documents, self.num_tokens, self.tokenizer_fingerprint)
        digest = hashlib.sha256(repr(facts).encode())
        for offset, count in self._sampled_spans():
            digest.update(self._stored(offset, count).tobytes())
        return digest.hexdigest()

    def _stored(self, offset: int, count: int) -> np.ndarray:
        wanted = count * self.dtype.itemsize
        try:
            raw = os.pread(self._descriptor, wanted, offset * self.dtype.itemsize)
            while 0 < len(raw) < wanted:  # the kernel hands out 2 GiB at most, and network disks less
                more = os.pread(self._descriptor, wanted - len(raw), offset * self.dtype.itemsize + len(raw))
                if not more:
                    break
                raw += more
        except OSError as error:
            raise DataError(f"{self._bin}: reading failed ({error.strerror}); check the disk and resume") from error
        if len(raw) != wanted:
            found = f"found {len(raw)}: the file has shrunk since it was opened"
            raise DataError(f"{self._bin}: wanted {wanted} bytes at token {offset}, {found}; {_REMEDY}")
        return np.frombuffer(raw, dtype=self.dtype)

    def _token_offset(self, sequence: int) -> int:
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _locate(self, token: int) -> tuple[int, int]:
        """The document that holds a token of the stream, and the token's place in it."""
        sequence = int(np.searchsorted(self._pointers, token * self.dtype.itemsize, side="right")) - 1
        document = int(np.searchsorted(self._documents, sequence, side="right")) - 1
        return document, token - self._token_offset(int(self._documents[document]))

    def _all_spans(self) -> list[tuple[int, int]]:
        return [(start, min(_CHUNK, self.num_tokens - start)) for start in range(0, self.num_tokens, _CHUNK)]

    def _sampled_spans(self) -> list[tuple[int, int]]:
        if self.num_tokens <= _SAMPLED_SPANS * _SAMPLED_TOKENS:
            return self._all_spans()
        last = self.num_tokens - _SAMPLED_TOKENS
        return [(last * i // (_SAMPLED_SPANS - 1), _SAMPLED_TOKENS) for i in range(_SAMPLED_SPANS)]

    def _refuse_missing(self) -> None:
        missing = [str(path) for path in (self._idx, self._bin) if not path.is_file()]
        if not missing:
            return
        megatron = f"{self.prefix}_text_document"
        hint = f"did you mean {megatron}?" if idx_path(megatron).is_file() else "run tools/preprocess_data.py first"
        wanted = f"wanted {self._idx} and {self._bin}"
        raise DataError(f"{self.prefix}: no indexed data; {wanted}, found no {' and no '.join(missing)}; {hint}")

    def _refused(self, wanted: str, found: object, remedy: str = _REMEDY) -> DataError:
        return DataError(f"{self._idx}: wanted {wanted}, found {found}; {remedy}")

    def _checked_header(self) -> tuple[np.dtype, int, int]:
        """Nothing is allocated or mapped before the counts agree with the file's size."""
        size = self._idx.stat().st_size
        try:
            with open(self._idx, "rb") as file:
                head = file.read(HEADER.size)
        except OSError as error:
            raise DataError(f"{self._idx}: cannot be read ({error.strerror}); check its permissions") from error
        if len(head) < HEADER.size:
            raise self._refused(f"a header of {HEADER.size} bytes", f"{len(head)} bytes in all")
        magic, version, code, sequences, boundaries = HEADER.unpack(head)
        if magic != MAGIC:
            raise self._refused(f"the magic {MAGIC!r} at byte 0", repr(magic), "give the prefix of indexed data")
        if version != VERSION:
            raise self._refused(f"version {VERSION} at byte 9", version)
        if code not in DTYPES:
            raise self._refused("an integer dtype code (1-5 or 8) at byte 17", code)
        if sequences < 1 or boundaries < 2:
            found = f"{sequences} and {boundaries}"
            raise self._refused("at least one sequence (byte 18) and two document boundaries (byte 26)", found)
        wanted = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (wanted, wanted + sequences):  # the latter: a mode per sequence, which multimodal files have
            said = f"{sequences} sequences and {boundaries - 1} documents"
            raise self._refused(f"{wanted} bytes for the {said} that the header declares", size)
        return DTYPES[code], sequences, boundaries - 1

    def _map_index(self) -> None:
        def mapped(dtype: str, offset: int, count: int) -> np.ndarray:
            return np.memmap(self._idx, mode="r", dtype=np.dtype(dtype), offset=offset, shape=(count,))

        lengths_at = HEADER.size
        pointers_at = lengths_at + 4 * self.num_sequences
        self._lengths = mapped("<i4", lengths_at, self.num_sequences)
        self._pointers = mapped("<i8", pointers_at, self.num_sequences)
        self._documents = mapped("<i8", pointers_at + 8 * self.num_sequences, self.num_documents + 1)

    def _checked_index(self) -> int:
        """Check lengths, pointers and documents against each other; return the number of tokens."""
        itemsize = self.dtype.itemsize
        tokens = 0
        for start in range(0, self.num_sequences, _CHUNK):
            lengths = self._lengths[start : start + _CHUNK].astype(np.int64)
            if (lengths < 1).any():
                wrong = int((lengths < 1).argmax())
                raise self._refused(f"length[{start + wrong}] of at least 1", lengths[wrong])
            ends = tokens + np.cumsum(lengths)
            pointers = (ends - lengths) * itemsize
            if (bad := self._pointers[start : start + _CHUNK] != pointers).any():
                wrong = int(bad.argmax())
                raise self._refused(f"pointer[{start + wrong}] = {pointers[wrong]}", self._pointers[start + wrong])
            tokens = int(ends[-1])
        first, last = int(self._documents[0]), int(self._documents[-1])
        if first != 0 or last != self.num_sequences:
            raise self._refused(f"documents from 0 to {self.num_sequences}", f"{first} to {last}")
        for start in range(0, self.num_documents, _CHUNK):
            part = self._documents[start : start + _CHUNK + 1]
            if (back := part[1:] < part[:-1]).any():
                wrong = start + int(back.argmax())
                raise self._refused(f"document[{wrong + 1}] >= {self._documents[wrong]}", self._documents[wrong + 1])
        return tokens

    def _check_bin_size(self) -> None:
        wanted, found = self.num_tokens * self.dtype.itemsize, self._bin.stat().st_size
        if wanted != found:
            what = "cut short" if found < wanted else "of other data"
            raise DataError(f"{self._bin}: wanted {wanted} bytes, found {found}; the file is {what}: {_REMEDY}")

    def _checked_manifest(self) -> IndexedManifest | None:
        path = manifest_path(self.prefix)
        manifest = read_manifest(path)
        if manifest is None:
            return None
        said = (manifest.documents, manifest.tokens, manifest.dtype)
        real = (self.num_documents, self.num_tokens, self.dtype.name)
        if said != real:
            raise DataError(
                f"{path}: wanted the documents, tokens and dtype {real} of the .idx, found {said}; {_REMEDY}"
            )
        return manifest


def _open_for_reading(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
