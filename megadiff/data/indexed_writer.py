"""Writer of indexed tokens: byte for byte what Megatron's builder writes, and never an index without its data.

Everything is written under temporary names (`P.bin.tmp`, ...), flushed to disk, and renamed in the order .bin, .json,
.idx; readers look for the .idx. A killed run leaves temporary files, which the next run on the same prefix overwrites.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import numpy as np

from megadiff.data.indexed_format import (
    MANIFEST_VERSION,
    IndexedManifest,
    InputFacts,
    TokenizerFacts,
    bin_path,
    idx_path,
    index_parts,
    manifest_bytes,
    manifest_path,
    token_dtype,
    wrong_ids,
)
from megadiff.errors import DataError
from megadiff.files import sync


class IndexedOutput:
    """The files of one prefix; a context manager that removes the temporary ones unless `publish` ran.

    Args:
        prefix: P; its folder is created if missing.
        overwrite: replace finished data of the same prefix, which are otherwise refused.

    Raises:
        DataError: data exist already, the folder cannot be written, or another process is writing this prefix.
    """

    def __init__(self, prefix: str | Path, *, overwrite: bool = False) -> None:
        self.prefix = str(prefix)
        self._finals = [bin_path(prefix), manifest_path(prefix), idx_path(prefix)]
        self._temporaries = [Path(f"{path}.tmp") for path in self._finals]
        self._refuse_existing(overwrite)
        self.bin = self._open_locked()

    def write(self, content: bytes) -> None:
        """Append to the `.bin`.

        Raises:
            DataError: the disk is full.
        """
        try:
            self.bin.write(content)
        except OSError as error:
            where = self._temporaries[0]
            raise DataError(f"{where}: writing failed ({error.strerror}); free disk space and run again") from error

    def write_index(self, parts: Iterable[bytes]) -> str:
        """Write the whole `.idx` and flush it to disk; return its SHA-256 (hex).

        Raises:
            OSError: the disk refuses.
        """
        return write_whole(self._temporaries[2], parts)

    def publish(self, manifest: IndexedManifest) -> None:
        """Write the manifest, then rename all three files to their final names; the index has been written before.

        Raises:
            OSError: the disk refuses.
        """
        self.bin.flush()
        os.fsync(self.bin.fileno())
        write_whole(self._temporaries[1], [manifest_bytes(manifest)])
        idx_path(self.prefix).unlink(missing_ok=True)
        for temporary, final in zip(self._temporaries, self._finals, strict=True):
            os.replace(temporary, final)
        sync(self._finals[0].parent)
        self.bin.close()

    def refused(self, error: OSError) -> DataError:
        """Return the error for a disk that refused to finish the files."""
        return DataError(f"{self.prefix}: writing failed ({error.strerror}); free disk space and run again")

    def abort(self) -> None:
        """Remove the temporary files; after `publish` there are none."""
        if self.bin.closed:
            return
        for temporary in self._temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        with suppress(OSError):  # closing flushes, which may fail on a full disk
            self.bin.close()

    def __enter__(self) -> IndexedOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _refuse_existing(self, overwrite: bool) -> None:
        there = [path for path in self._finals if path.exists()]
        if there and not overwrite and not self._half_renamed():
            raise DataError(f"{there[0]}: data are there already; choose another --output-prefix or give --overwrite")

    def _half_renamed(self) -> bool:
        """Return whether a killed run left .bin and .json without .idx; it also left its .idx.tmp."""
        return self._temporaries[2].exists() and not self._finals[2].exists()

    def _open_locked(self) -> BufferedWriter:
        path = self._temporaries[0]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened with "ab", not "wb": until it is locked, the file may belong to another process.
            file = open(path, "ab")  # noqa: SIM115 - closed by `publish` or `abort`
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another --output-prefix") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(f"{path}: another process is writing it; wait for it or choose another prefix") from None
        except OSError:
            pass  # a file system without locks, such as some NFS: two runs must not share a prefix there
        file.truncate(0)
        stale = self._finals[:2] if self._half_renamed() else []
        for path in (*stale, *self._temporaries[1:]):
            path.unlink(missing_ok=True)
        return file


def write_whole(path: Path, parts: Iterable[bytes]) -> str:
    """Write a file and flush it to disk; return its SHA-256 (hex)."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


_WRITE_CHUNK = 2**20


class IndexedWriter:
    """Writer of the documents of one prefix; a context manager that removes its temporary files unless `finish` ran.

    Args:
        prefix: P; its folder is created if missing.
        vocab_size: ids must be below it; it also determines the integer type.
        mask_id: the id that text must never contain, if any.
        overwrite: replace finished data of the same prefix, which are otherwise refused.

    Raises:
        DataError: data exist already, the folder cannot be written, or another process is writing this prefix.
    """

    def __init__(
        self, prefix: str | Path, *, vocab_size: int, mask_id: int | None = None, overwrite: bool = False
    ) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.mask_id = mask_id
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")
        self._sequences: array[int] | None = None
        self._sha256 = hashlib.sha256()
        self._output = IndexedOutput(prefix, overwrite=overwrite)

    @property
    def num_documents(self) -> int:
        """Number of documents added so far."""
        return len(self._lengths if self._sequences is None else self._sequences)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Add one document of at least one token; see `add_documents`."""
        self.add_documents(np.asarray(ids), [len(ids)])

    def add_documents(
        self, ids: np.ndarray, lengths: Sequence[int] | np.ndarray, spans: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Add documents that lie one after another in `ids` ([sum(lengths)], any integer type); all of them or none.

        Args:
            ids: the tokens.
            lengths: number of tokens of each document, or of each span.
            spans: number of spans of each document (`IndexedManifest.spans`), which may be empty; None where documents
                have none. A file has spans in all of its documents or in none.

        Raises:
            DataError: an id is outside 0 .. V - 1 or the mask, a document is empty, or the disk is full.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        if lengths.sum() != ids.size:
            raise ValueError(f"lengths must add up to the {ids.size} ids, got {lengths.sum()}")
        if lengths.size == 0:
            return
        least = 1 if spans is None else 0
        if lengths.min() < least or lengths.max() > np.iinfo(np.int32).max:
            wrong = self.num_documents + int(np.flatnonzero((lengths < least) | (lengths > np.iinfo(np.int32).max))[0])
            raise DataError(
                f"{self.prefix}: document {wrong} must hold 1 to 2**31 - 1 tokens; leave it out or split it"
            )
        self._refuse_wrong(ids, lengths)
        for start in range(0, ids.size, _WRITE_CHUNK):
            content = ids[start : start + _WRITE_CHUNK].astype(self.dtype).tobytes()
            self._output.write(content)
            self._sha256.update(content)
        self._lengths.extend(lengths.tolist())
        if spans is not None:
            self._sequences = array("i") if self._sequences is None else self._sequences
            self._sequences.extend(int(number) for number in spans)
        self.num_tokens += int(ids.size)

    def finish(
        self,
        *,
        tokenizer: TokenizerFacts,
        source_bytes: int,
        inputs: Sequence[InputFacts] = (),
        appended_eod: bool = False,
        prepended_bos: bool = False,
        chat_template: str | None = None,
    ) -> IndexedManifest:
        """Write the index and the manifest, then rename all three files to their final names; see `IndexedManifest`.

        Raises:
            DataError: nothing was added, or the disk is full.
        """
        if not self.num_documents:
            raise no_documents(self.prefix)
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        documents = None if self._sequences is None else np.frombuffer(self._sequences, dtype=np.intc)
        parts = index_parts(self.dtype, lengths.size, lambda: [lengths], documents)
        with_spans = {} if documents is None else {"version": MANIFEST_VERSION, "spans": "answers"}
        try:
            manifest = IndexedManifest(
                **with_spans,
                tokenizer=tokenizer,
                documents=self.num_documents,
                tokens=self.num_tokens,
                source_bytes=source_bytes,
                dtype=self.dtype.name,
                bin_sha256=self._sha256.hexdigest(),
                idx_sha256=self._output.write_index(parts),
                appended_eod=appended_eod,
                prepended_bos=prepended_bos,
                chat_template=chat_template,
                inputs=tuple(inputs),
            )
            self._output.publish(manifest)
        except OSError as error:
            raise self._output.refused(error) from error
        return manifest

    def abort(self) -> None:
        """Remove this writer's temporary files; after `finish` there are none."""
        self._output.abort()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _refuse_wrong(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        for start in range(0, ids.size, _WRITE_CHUNK):
            part = ids[start : start + _WRITE_CHUNK]
            wrong = wrong_ids(part, vocab_size=self.vocab_size, mask_id=self.mask_id)
            if wrong.size:
                raise self._wrong_id(int(part[wrong[0]]), start + int(wrong[0]), lengths)

    def _wrong_id(self, found: int, place: int, lengths: np.ndarray) -> DataError:
        document = self.num_documents + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        what = "the mask, which no text may hold" if found == self.mask_id else f"wanted 0 to {self.vocab_size - 1}"
        return DataError(
            f"{self.prefix}: document {document} has the token id {found} ({what}); the tokenizer does not keep to its "
            "vocabulary: use another one"
        )


def no_documents(where: str) -> DataError:
    """Return the error for a corpus without any document."""
    return DataError(f"{where}: no documents to write; check the input files and the text key")
