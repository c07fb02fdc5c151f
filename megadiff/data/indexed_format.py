"""The format of Megatron's indexed binaries, and the manifest beside them.

    P.bin   the tokens of all sequences, one after another, in one integer type
    P.idx   magic[9] version:u64=1 dtype:u8 sequences:u64 documents+1:u64
            lengths:i32[S]  pointers:i64[S] (byte offsets into P.bin)  documents:i64[D + 1] (sequence numbers, 0 .. S)
            and, in multimodal files only, modes:i8[S]

Little-endian throughout. Source: megatron.core.datasets.indexed_dataset of megatron-core 0.16.1.

A folder of shards holds one `tokens.idx` and `tokens.json` of all its tokens, and these in `shards/000000/tokens.bin`,
`shards/000001/tokens.bin` and so on, each with an index and a manifest of its own.

Nothing is mapped: a file that shrinks while it is read causes an error, where a mapping would cause a signal, and no
array is a view of a closed file.

The manifest `P.json` holds what Megatron's own format has no room for. Megatron's readers ignore it, and data without
one can be read too.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from megadiff.config.section import Section
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError, StorageError
from megadiff.files import UnreadableFileError, first_fault, read_bytes

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

CHUNK = 2**20
"""Number of integers, or bytes, in one piece."""

REMEDY = "copy or preprocess the data again"

TOKENS = "tokens"
"""Name, without its ending, of the files in a folder of shards and in each shard."""

SHARDS = "shards"
"""Name of the folder that holds the shards."""

_SHARD_NAME = re.compile(r"\d{6}")
_MOST_OPEN = 128


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of this vocabulary."""
    return DTYPES[8] if vocab_size < _UINT16_BELOW else DTYPES[4]


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


def shard_folder(prefix: str | Path) -> Path | None:
    """Return the path if it is a folder of shards, finished or not; None if it is a prefix or nothing at all."""
    folder = Path(prefix)
    if idx_path(prefix).is_file() or not Path(folder, SHARDS).is_dir():
        return None
    return folder


def shard_prefixes(folder: str | Path) -> list[Path]:
    """Return the prefixes of the shards that hold tokens, in order; none where there is no folder of shards."""
    try:
        names = sorted(name for name in os.listdir(Path(folder, SHARDS)) if _SHARD_NAME.fullmatch(name))
    except OSError:
        return []
    prefixes = (Path(folder, SHARDS, name, TOKENS) for name in names)
    return [prefix for prefix in prefixes if bin_path(prefix).is_file()]


def index_parts(
    dtype: np.dtype,
    sequences: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    documents: np.ndarray | None = None,
) -> Iterator[bytes]:
    """Yield the content of an `.idx` in pieces.

    Args:
        dtype: stored type of the tokens.
        sequences: number of sequences.
        lengths: function that returns their lengths in order, in pieces of any size; it is called twice.
        documents: number of sequences in each document, [D]; None where each document is one sequence.
    """
    boundaries = sequences + 1 if documents is None else len(documents) + 1
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, boundaries)
    for part in lengths():
        for start in range(0, part.size, CHUNK):
            yield part[start : start + CHUNK].astype("<i4").tobytes()
    offset = 0
    for part in lengths():
        for start in range(0, part.size, CHUNK):
            ends = offset + np.cumsum(part[start : start + CHUNK], dtype=np.int64) * dtype.itemsize
            yield np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes()
            offset = int(ends[-1])
    if documents is not None:
        yield np.concatenate([[0], np.cumsum(documents, dtype=np.int64)]).astype("<i8").tobytes()
        return
    for start in range(0, sequences + 1, CHUNK):
        yield np.arange(start, min(start + CHUNK, sequences + 1), dtype="<i8").tobytes()


class StoredFile:
    """A regular file opened once for reading; closed when nothing references it any more.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on; the caller has checked them against `size`.

        Raises:
            StorageError: the disk fails.
            DataError: the file has shrunk since it was opened.
        """
        try:
            raw = os.pread(self._descriptor, count, offset)
            while 0 < len(raw) < count:  # the kernel returns at most 2 GiB per call, network disks less
                more = os.pread(self._descriptor, count - len(raw), offset + len(raw))
                if not more:
                    break
                raw += more
        except OSError as error:
            raise StorageError(f"{self.path}: reading failed ({error.strerror}); check the disk and resume") from error
        if len(raw) != count:
            found = f"found {len(raw)}: the file has shrunk since it was opened"
            raise DataError(f"{self.path}: wanted {count} bytes at byte {offset}, {found}; {REMEDY}")
        return raw

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the whole file."""
        digest = hashlib.sha256()
        for start in range(0, self.size, CHUNK):
            digest.update(self.read(start, min(CHUNK, self.size - start)))
        return digest.hexdigest()


class JoinedFile(StoredFile):
    """Several files, one after another, as one; at most 128 of them are open at a time.

    Args:
        path: the folder, for messages.
        parts: the files in order, none of them empty.

    Raises:
        DataError: there is none, or one cannot be read.
    """

    def __init__(self, path: Path, parts: Iterable[Path]) -> None:
        self.path = path
        self._parts = list(parts)
        if not self._parts:
            raise DataError(f"{path}: wanted at least one shard with tokens, found none; {REMEDY}")
        self._sizes = [_size_of(part) for part in self._parts]
        self._ends = list(accumulate(self._sizes))
        self._open: OrderedDict[int, StoredFile] = OrderedDict()
        self._lock = threading.Lock()
        self.size = self._ends[-1]

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on, across the files' ends; see `StoredFile.read`."""
        place = bisect.bisect_right(self._ends, offset)
        found: list[bytes] = []
        while count:
            within = offset - (self._ends[place] - self._sizes[place])
            here = min(count, self._sizes[place] - within)
            found.append(self._file(place).read(within, here))
            offset, count, place = offset + here, count - here, place + 1
        return found[0] if len(found) == 1 else b"".join(found)

    def _file(self, place: int) -> StoredFile:
        with self._lock:  # the loader's thread and the main thread read at the same time
            file = self._open.pop(place, None) or StoredFile(self._parts[place])
            self._open[place] = file
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)  # closed as soon as no thread reads it any more
        if file.size != self._sizes[place]:
            found = f"found {file.size}: the file has changed since the folder was opened"
            raise DataError(f"{file.path}: wanted {self._sizes[place]} bytes, {found}; {REMEDY}")
        return file


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


class StoredIntegers:
    """An array of `count` integers of one type in a file, from byte `offset` on."""

    def __init__(self, file: StoredFile, dtype: np.dtype, *, offset: int, count: int) -> None:
        self.file = file
        self.dtype = dtype
        self.offset = offset
        self._count = count

    def __len__(self) -> int:
        return self._count

    def byte_of(self, index: int) -> int:
        """Return the byte position of integer `index` in the file."""
        return self.offset + index * self.dtype.itemsize

    def read(self, start: int, count: int) -> np.ndarray:
        """Return the integers `start` .. `start + count - 1`: [count], read-only, as stored."""
        raw = self.file.read(self.byte_of(start), count * self.dtype.itemsize)
        return np.frombuffer(raw, dtype=self.dtype)

    def at(self, index: int) -> int:
        """Return one integer."""
        return int(self.read(index, 1)[0])

    def chunks(self, *, overlap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first index, integers) of all pieces, each followed by up to `overlap` integers of the next one."""
        for start in range(0, self._count, CHUNK):
            yield start, self.read(start, min(CHUNK + overlap, self._count - start))

    def last_at_most(self, value: int) -> int:
        """Return the last index with an integer of at most `value`, for ascending integers; -1 if there is none."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.at(middle) <= value else (low, middle)
        return low - 1


MANIFEST_VERSION = 3
"""Newest version of the manifest; 2 added `idx_sha256`, 3 `spans` and what belongs to them. Older ones are read too."""

_VERSION_WITHOUT_SPANS = 2
"""Version of the manifests that are written for data without spans, which older releases read."""

_OF_CONVERSATIONS = ("spans", "chat_template")
"""Keys that are left out where they are None, so that older releases read other data."""

_MAX_MANIFEST_BYTES = 2**26

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""


# The docstrings of these sections describe no settings, so pydantic need not read this file to find them.
class TokenizerFacts(Section, use_attribute_docstrings=False):
    """The tokenizer that made the ids."""

    name: str
    """Name for display."""

    fingerprint: str
    """SHA-256 (hex) of the tokenizer's meaning, which decides whether data match a tokenizer."""

    vocab_size: int = Field(gt=0)
    """Number of ids V, mask included."""

    mask_id: int = Field(ge=0)
    """Id of the mask, which the data never contain."""

    bos_id: int | None
    """Id of begin-of-text, if any."""

    eos_id: int | None
    """Id of end-of-text, if any."""

    pad_id: int | None
    """Id of padding, if any."""


class InputFacts(Section, use_attribute_docstrings=False):
    """One corpus file."""

    name: str
    """Name without the folder."""

    bytes: int = Field(ge=0)
    """Size in bytes as stored on disk, compressed or not."""

    sha256: Sha256
    """SHA-256 (hex) of the file as stored."""

    @field_validator("name")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ValueError(f"wanted a file's name without its folder, found {name!r}")
        return name


class IndexedManifest(Section, use_attribute_docstrings=False):
    """The content of `P.json`."""

    version: int = Field(default=_VERSION_WITHOUT_SPANS, ge=1)
    """Version of the manifest's layout."""

    tokenizer: TokenizerFacts
    """The tokenizer that made the ids."""

    documents: int = Field(ge=0)
    """Number of documents in the index."""

    tokens: int = Field(ge=0)
    """Number of tokens in the `.bin`, added bos and eos included."""

    source_bytes: int = Field(ge=0)
    """Number of UTF-8 bytes of the source text, which bits per byte need."""

    dtype: str
    """Type of the stored ids: `uint16` or `int32`."""

    bin_sha256: Sha256
    """SHA-256 (hex) of the `.bin` file."""

    idx_sha256: Sha256 | None = None
    """SHA-256 (hex) of the `.idx` file; None in a manifest of version 1."""

    appended_eod: bool
    """Whether eos ends every document."""

    prepended_bos: bool
    """Whether bos starts every document."""

    inputs: tuple[InputFacts, ...]
    """Corpus files in the order in which they were read."""

    spans: Literal["answers"] | None = None
    """Meaning of the sequences of a document: `answers` in conversations, whose first, third, fifth, ... sequence is
    given to the model and whose others it learns to predict; None where a document is one sequence."""

    chat_template: Sha256 | None = None
    """SHA-256 (hex) of the chat template that made text of messages; None of data without one, or from before it was
    recorded."""

    @model_validator(mode="after")
    def _spans_have_their_version(self) -> IndexedManifest:
        if self.spans is not None and self.version < MANIFEST_VERSION:
            raise ValueError(f"spans need a manifest of version {MANIFEST_VERSION}, found {self.version}")
        return self

    @model_serializer(mode="wrap")
    def _without_unset_spans(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if key not in _OF_CONVERSATIONS or value is not None}


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """Return a tokenizer's entry in the manifest."""
    return TokenizerFacts(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def manifest_bytes(manifest: IndexedManifest) -> bytes:
    """Return the file's content: JSON, identical for identical facts."""
    return orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_manifest(path: Path) -> IndexedManifest | None:
    """Return the content of `P.json`; None if there is no such file.

    Raises:
        DataError: the file is not a manifest, or has a newer version.
    """
    try:
        found = orjson.loads(read_bytes(path, max_bytes=_MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except UnreadableFileError as error:
        raise DataError(f"{path}: the manifest {error}; make the data again") from error
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror}); check its permissions") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: the manifest is not JSON ({error}); make the data again or remove it") from error
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        newest = f"wanted a manifest of version {MANIFEST_VERSION} at most"
        raise DataError(f"{path}: {newest}, found {version}; upgrade megadiff")
    try:
        return IndexedManifest.model_validate(found)
    except ValidationError as error:
        key, rule = first_fault(error)
        raise DataError(f"{path}: `{key}` in the manifest: {rule}; make the data again or remove it") from error
