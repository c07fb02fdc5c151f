"""Complete scan of indexed data, which `megadiff check_data` reports.

Opening data checks the index and samples the tokens; a scan reads all tokens once, in order. It hashes what it reads
while other threads check the ids, and lists all findings instead of stopping at the first.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megadiff.data.indexed_format import StoredFile, TokenizerFacts, wrong_ids
from megadiff.data.indexed_reader import IndexedReader
from megadiff.errors import SHOWN_DIGITS, DataError

MAX_LISTED = 10
"""Maximal number of findings of one kind and one prefix that are listed; the rest are counted."""

_IN_FLIGHT_PER_WORKER = 2


@dataclass(frozen=True)
class Finding:
    """A fault or oddity of one file."""

    where: str
    """The file or prefix, with document, position and byte if applicable."""
    what: str
    remedy: str
    is_error: bool = True
    """Whether the data must not be used; otherwise the finding is only worth knowing."""

    def __str__(self) -> str:
        return f"{'error' if self.is_error else 'note'}: {self.where}: {self.what}; {self.remedy}"


@dataclass
class Scan:
    """Result of the scan of one prefix."""

    prefix: str
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    """Number of tokens with the tokenizer's padding id."""
    dtype: str = "-"
    bytes: int = 0
    """Size of the `.bin` and the `.idx` together, in bytes."""
    hashes: str = "-"
    """Result of comparing hashes: `match`, `differ`, or `none` if there is no manifest to compare with."""
    wrong_tokens: int = 0
    """Number of tokens that are negative, outside the vocabulary, or the mask."""
    listed_tokens: int = 0
    """Number of those that have a finding of their own."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def unlisted(self) -> int:
        """Number of wrong tokens that are counted but not listed."""
        return self.wrong_tokens - self.listed_tokens

    @property
    def errors(self) -> int:
        """Number of findings that make the data unusable, including wrong tokens that are only counted."""
        return self.unlisted + sum(finding.is_error for finding in self.findings)


@dataclass(frozen=True)
class _Seen:
    """Content of one span of tokens."""

    first: int
    wrong: list[tuple[int, int]]
    """The first few wrong tokens, as (token of the stream, its id)."""
    num_wrong: int
    first_padding: int | None
    padding: int


def scan(
    prefix: str | Path,
    *,
    tokenizer: TokenizerFacts | None = None,
    workers: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Scan:
    """Read all of one prefix.

    Args:
        prefix: P, `P.bin` or `P.idx`.
        tokenizer: tokenizer of the run that will use the data; by default the one in the manifest.
        workers: threads that check tokens besides the one that reads and hashes.
        progress: called with the number of bytes of the `.bin` done.
    """
    found = Scan(str(prefix))
    try:
        reader = IndexedReader(prefix)
        found.prefix, found.dtype = reader.prefix, reader.dtype.name
        found.documents, found.tokens = reader.num_documents, reader.num_tokens
        found.bytes = sum(file.size for file in reader.files)
        known = tokenizer or (reader.manifest.tokenizer if reader.manifest else None)
        _compare_tokenizers(found, reader, tokenizer)
        _note_empty(found, reader)
        bin_sha256 = _look_at_tokens(found, reader, known, workers, progress)
        _compare_hashes(found, reader, bin_sha256)
    except DataError as error:
        where, _, what = str(error).partition(": ")
        what, _, remedy = what.rpartition("; ")
        found.findings.append(Finding(where, what, remedy))
    return found


def _compare_tokenizers(found: Scan, reader: IndexedReader, tokenizer: TokenizerFacts | None) -> None:
    manifest = reader.manifest
    if manifest is None:
        where, missing = f"{reader.prefix}.json", "there is no manifest, so no hashes to compare"
        if tokenizer is None:
            missing += ", and no --tokenizer, so no ids to compare with"
        remedy = "preprocess with `megadiff preprocess_data` to have one"
        found.findings.append(Finding(where, missing, remedy, is_error=False))
    elif tokenizer is not None and manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        made, given = manifest.tokenizer, tokenizer
        then, now = made.fingerprint[:SHOWN_DIGITS], given.fingerprint[:SHOWN_DIGITS]
        what = f"made with tokenizer {made.name} ({then}), not {given.name} ({now})"
        found.findings.append(Finding(f"{reader.prefix}.json", what, "preprocess the corpus with the second"))


def _note_empty(found: Scan, reader: IndexedReader) -> None:
    found.empty_documents, first = reader.empty_documents()
    if first is not None:
        where = f"{reader.files[1].path}: document {first}"
        what = f"no tokens ({found.empty_documents} empty document(s) in all)"
        found.findings.append(Finding(where, what, "harmless to training; leave them out next time", is_error=False))


def _look_at_tokens(
    found: Scan,
    reader: IndexedReader,
    tokenizer: TokenizerFacts | None,
    workers: int,
    progress: Callable[[int], None],
) -> str:
    """Check all tokens of the `.bin` and return its SHA-256 (hex)."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(workers) as pool:

        def seen() -> Iterator[Future[_Seen]]:
            waiting: deque[Future[_Seen]] = deque()
            for first, ids in reader.stored_tokens.chunks():
                waiting.append(pool.submit(_look, first, ids, tokenizer))
                digest.update(ids.data)
                if len(waiting) > workers * _IN_FLIGHT_PER_WORKER:
                    yield waiting.popleft()
                progress((first + len(ids)) * reader.dtype.itemsize)
            yield from waiting

        for span in seen():
            _take(found, reader, tokenizer, span.result())
    return digest.hexdigest()


def _look(first: int, ids: np.ndarray, tokenizer: TokenizerFacts | None) -> _Seen:
    vocab_size, mask_id = (tokenizer.vocab_size, tokenizer.mask_id) if tokenizer else (None, None)
    wrong = wrong_ids(ids, vocab_size=vocab_size, mask_id=mask_id)
    listed = [(first + int(place), int(ids[place])) for place in wrong[:MAX_LISTED]]
    pad_id = tokenizer.pad_id if tokenizer else None
    if pad_id in (None, mask_id):
        return _Seen(first, listed, wrong.size, None, 0)
    is_padding = ids == pad_id
    padding = int(np.count_nonzero(is_padding))
    return _Seen(first, listed, wrong.size, first + int(is_padding.argmax()) if padding else None, padding)


def _take(found: Scan, reader: IndexedReader, tokenizer: TokenizerFacts | None, seen: _Seen) -> None:
    if seen.first_padding is not None and not found.padding_tokens:
        where, remedy = _place(reader, seen.first_padding), "drop the padding unless the model shall learn it"
        found.findings.append(Finding(where, "the padding id; the column `padding` counts it", remedy, is_error=False))
    found.padding_tokens += seen.padding
    found.wrong_tokens += seen.num_wrong
    for token, token_id in seen.wrong[: MAX_LISTED - found.listed_tokens]:
        is_mask = tokenizer is not None and token_id == tokenizer.mask_id
        limit = f"wanted 0 to {tokenizer.vocab_size - 1}" if tokenizer else "wanted 0 or more"
        what = f"the token id {token_id} ({'the mask id' if is_mask else limit})"
        remedy = "preprocess the corpus with the run's tokenizer"
        found.findings.append(Finding(_place(reader, token), what, remedy))
        found.listed_tokens += 1


def _place(reader: IndexedReader, token: int) -> str:
    document, position = reader.locate(token)
    byte = token * reader.dtype.itemsize
    return f"{reader.files[0].path}: document {document}, position {position}, byte {byte}"


def _compare_hashes(found: Scan, reader: IndexedReader, bin_sha256: str) -> None:
    manifest = reader.manifest
    if manifest is None:
        found.hashes = "none"
        return
    found.hashes = "match"
    index: StoredFile = reader.files[1]
    pairs = [(reader.files[0], manifest.bin_sha256, bin_sha256)]
    if manifest.idx_sha256 is not None:  # manifests of version 1 lack it
        pairs.append((index, manifest.idx_sha256, index.sha256()))
    for file, wanted, real in pairs:
        if wanted != real:
            found.hashes = "differ"
            what = f"changed since it was written: wanted SHA-256 {wanted}, found {real}"
            found.findings.append(Finding(str(file.path), what, "copy or preprocess the data again"))
