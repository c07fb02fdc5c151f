"""The end of a folder of shards: one index of all tokens, and on request one `.bin` in place of the shards.

Both are byte for byte what one process would have written. Nothing is tokenized again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megadiff.data.corpus_streams import corpus_path
from megadiff.data.documents import MAX_LISTED, SKIPPED, CorpusReport, InputFile
from megadiff.data.indexed_format import (
    CHUNK,
    HEADER,
    MANIFEST_VERSION,
    TOKENS,
    IndexedManifest,
    InputFacts,
    StoredFile,
    StoredIntegers,
    bin_path,
    idx_path,
    index_parts,
    manifest_bytes,
    manifest_path,
    read_manifest,
    token_dtype,
)
from megadiff.data.indexed_writer import IndexedOutput, no_documents
from megadiff.data.preprocess import ProgressReport
from megadiff.data.shards.ledger import Claims, Ledger, UnitRecord
from megadiff.data.shards.plan import ShardPlan
from megadiff.errors import DataError

_LOOK_EVERY_S = 0.5
_COPY_BYTES = 2**26
_NO_COPY_RANGE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


def finish(folder: str | Path) -> IndexedManifest:
    """Write the index and the manifest of a folder whose units are all done; return the manifest.

    One process writes them while others that call this wait. A folder that is finished is left as it is.

    Raises:
        DataError: units are missing, a shard is damaged, no unit has documents, or the disk is full.
    """
    ledger = Ledger(folder)
    plan = ledger.plan()
    claims = Claims(ledger.claims_folder)
    while not ledger.is_finished:
        _refuse_missing(ledger, plan)
        claim = claims.take("index")
        if claim is None:
            time.sleep(_LOOK_EVERY_S)
            continue
        with claim:
            if not ledger.is_finished:
                _write_index(ledger, plan)
    manifest = read_manifest(manifest_path(ledger.folder / TOKENS))
    if manifest is None:
        path = manifest_path(ledger.folder / TOKENS)
        remedy = f"remove {idx_path(ledger.folder / TOKENS)} and repeat the command"
        raise DataError(f"{path}: the manifest of the shards is gone; {remedy}")
    return manifest


def merge(folder: str | Path, prefix: str | Path, *, overwrite: bool = False) -> IndexedManifest:
    """Write the tokens of a folder of shards as one `P.bin`, with `P.idx` and `P.json`; the folder stays.

    Args:
        folder: the folder, whose units are all done.
        prefix: P.
        overwrite: replace finished data of the same prefix; what an earlier call has merged is left as it is.

    Raises:
        DataError: as for `finish`; or P exists already, with other content, or cannot be written.
    """
    manifest = finish(folder)
    if not overwrite and _is_merged(prefix, manifest):
        return manifest
    ledger = Ledger(folder)
    shards = [bin_path(ledger.prefix(record.unit)) for record in _records(ledger, ledger.plan()) if record.tokens]
    with IndexedOutput(prefix, overwrite=overwrite) as output:
        try:
            with ProgressReport("copying", manifest.tokens * np.dtype(manifest.dtype).itemsize) as progress:
                for path in shards:
                    _append(path, output.bin)
                    progress.update(output.bin.tell(), "")
            found, wanted = output.bin.tell(), manifest.tokens * np.dtype(manifest.dtype).itemsize
            if found != wanted:
                raise DataError(f"{folder}: wanted {wanted} bytes in the shards, found {found}; make the data again")
            index = StoredFile(idx_path(ledger.folder / TOKENS))
            output.write_index(index.read(at, min(CHUNK, index.size - at)) for at in range(0, index.size, CHUNK))
            output.publish(manifest)
        except OSError as error:
            raise output.refused(error) from error
    return manifest


def _is_merged(prefix: str | Path, manifest: IndexedManifest) -> bool:
    """Return whether a prefix has the tokens of a folder already."""
    paths = [bin_path(prefix), idx_path(prefix)]
    if not all(path.is_file() for path in paths) or read_manifest(manifest_path(prefix)) != manifest:
        return False
    return paths[0].stat().st_size == manifest.tokens * np.dtype(manifest.dtype).itemsize


def report_of(folder: str | Path) -> CorpusReport:
    """Return the counts of a finished folder of shards, as one pass over the corpus would report them."""
    ledger = Ledger(folder)
    plan = ledger.plan()
    records = _records(ledger, plan)
    examples = [example for record in records for example in record.bad_examples]
    return CorpusReport(
        documents=sum(record.documents for record in records),
        bad_examples=examples[:MAX_LISTED],
        **{name: sum(getattr(record, name) for record in records) for name in SKIPPED},
        bytes_read=sum(file.bytes for file in plan.inputs),
        files=_files(plan, records),
    )


def _refuse_missing(ledger: Ledger, plan: ShardPlan) -> None:
    missing = sorted(set(range(len(plan.units))) - ledger.done())
    if missing:
        listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{ledger.folder}: wanted all {len(plan.units)} units done, found {len(missing)} that are not ({listed}); "
            "repeat the command that began the folder, then this one"
        )


def _records(ledger: Ledger, plan: ShardPlan) -> list[UnitRecord]:
    return [ledger.record(unit) for unit in range(len(plan.units))]


def _write_index(ledger: Ledger, plan: ShardPlan) -> None:
    """Write the manifest, then the index, which is what readers look for."""
    records = _records(ledger, plan)
    with_tokens = [record for record in records if record.tokens]
    if not with_tokens:
        raise no_documents(str(ledger.folder))
    dtype = token_dtype(plan.tokenizer.vocab_size)
    documents = sum(record.documents for record in records)

    def lengths() -> Iterator[np.ndarray]:
        for record in with_tokens:
            for _, part in _index_of(ledger, record).lengths.chunks():
                yield part

    spans, with_spans = None, {}
    if (options := plan.settings.conversations) is not None:
        spans = np.concatenate([_index_of(ledger, record).spans() for record in with_tokens])
        with_spans = {"version": MANIFEST_VERSION, "spans": "answers", "chat_template": options.template_sha256}
    sequences = documents if spans is None else int(spans.sum())
    digest = hashlib.sha256()
    for part in index_parts(dtype, sequences, lengths, spans):
        digest.update(part)
    manifest = IndexedManifest(
        **with_spans,
        tokenizer=plan.tokenizer,
        documents=documents,
        tokens=sum(record.tokens for record in records),
        source_bytes=sum(record.source_bytes for record in records),
        dtype=dtype.name,
        bin_sha256=_bin_sha256(ledger, with_tokens, dtype),
        idx_sha256=digest.hexdigest(),
        appended_eod=plan.settings.append_eod,
        prepended_bos=plan.settings.prepend_bos,
        inputs=tuple(
            InputFacts(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in _files(plan, records)
        ),
    )
    ledger.write(f"{TOKENS}.json", [manifest_bytes(manifest)])
    ledger.write(f"{TOKENS}.idx", index_parts(dtype, sequences, lengths, spans))
    ledger.clear()


class _ShardIndex(NamedTuple):
    """The index of a shard."""

    lengths: StoredIntegers
    """Lengths of its sequences."""
    boundaries: StoredIntegers
    """Sequences with which its documents begin, and their number."""

    def spans(self) -> np.ndarray:
        """Return the number of sequences of each document, [D]."""
        return np.diff(self.boundaries.read(0, len(self.boundaries)))


def _index_of(ledger: Ledger, record: UnitRecord) -> _ShardIndex:
    """Return the index of a shard, of the size that its record and its header want."""
    file = StoredFile(idx_path(ledger.prefix(record.unit)))
    is_whole = file.size >= HEADER.size
    sequences = HEADER.unpack(file.read(0, HEADER.size))[3] if is_whole else 0
    wanted = HEADER.size + 12 * sequences + 8 * (record.documents + 1)
    if file.size != wanted:
        raise _damaged(ledger, record, file.path, f"wanted {wanted} bytes, found {file.size}")
    boundaries_at = HEADER.size + 12 * sequences
    return _ShardIndex(
        StoredIntegers(file, np.dtype("<i4"), offset=HEADER.size, count=sequences),
        StoredIntegers(file, np.dtype("<i8"), offset=boundaries_at, count=record.documents + 1),
    )


def _bin_sha256(ledger: Ledger, records: list[UnitRecord], dtype: np.dtype) -> str:
    """Return the SHA-256 (hex) of all shards' tokens one after another; each is compared with its record."""
    whole = hashlib.sha256()
    total = sum(record.tokens for record in records) * dtype.itemsize
    done = 0
    with ThreadPoolExecutor(1) as other, ProgressReport("checking", total) as progress:
        for record in records:
            file = StoredFile(bin_path(ledger.prefix(record.unit)))
            if file.size != record.tokens * dtype.itemsize:
                wanted = f"wanted {record.tokens * dtype.itemsize} bytes, found {file.size}"
                raise _damaged(ledger, record, file.path, wanted)
            own = hashlib.sha256()
            for start in range(0, file.size, CHUNK):
                content = file.read(start, min(CHUNK, file.size - start))
                beside = other.submit(own.update, content)
                whole.update(content)
                beside.result()
                done += len(content)
                progress.update(done, "")
            if own.hexdigest() != record.bin_sha256:
                raise _damaged(ledger, record, file.path, "its SHA-256 is not that of the record")
    return whole.hexdigest()


def _damaged(ledger: Ledger, record: UnitRecord, path: Path, what: str) -> DataError:
    shard = ledger.prefix(record.unit).parent
    return DataError(
        f"{path}: the shard is damaged ({what}); remove {shard} and repeat the command, which makes it again"
    )


def _files(plan: ShardPlan, records: list[UnitRecord]) -> list[InputFile]:
    """Return the inputs with their hashes and numbers of documents."""
    documents = [0] * len(plan.inputs)
    hashes = [""] * len(plan.inputs)
    for unit, record in zip(plan.units, records, strict=True):
        for place, part in enumerate(record.inputs, start=unit.first):
            documents[place] += part.documents
            if unit.end is None or record.whole_input_sha256 is not None:
                hashes[place] = record.whole_input_sha256 or part.sha256
    return [
        InputFile(corpus_path(file.path).name, file.bytes, sha256, found)
        for file, sha256, found in zip(plan.inputs, hashes, documents, strict=True)
    ]


def _append(source: Path, target: BufferedWriter) -> None:
    """Append a file to an open one inside the kernel, or piece by piece where the file systems cannot."""
    target.flush()
    with open(source, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while left:
            try:
                copied = os.copy_file_range(file.fileno(), target.fileno(), min(left, _COPY_BYTES))
            except OSError as error:
                if error.errno not in _NO_COPY_RANGE:
                    raise
                copied = target.write(file.read(min(left, CHUNK)))
                target.flush()
            if not copied:
                return  # cut short meanwhile, which the comparison of sizes finds
            left -= copied
